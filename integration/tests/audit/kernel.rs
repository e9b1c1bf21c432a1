//! A network namespace, and nft in it.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::{Command, Stdio};

use portcullis_integration::lab::Namespace;
use portcullis_integration::requirement::{Requirement, available};

pub fn nft_program() -> OsString {
    std::env::var_os("NFT").unwrap_or_else(|| "nft".into())
}

/// Feeds `script` to nft. A child of another test that was forked a moment ago may still hold the
/// socket that owns the table, until it has become its program; so this tries for a while.
pub fn nft(script: &str) {
    let done = (0..50).any(|_| {
        let mut command = Command::new(nft_program());
        command.args(["-f", "-"]).stdin(Stdio::piped());
        let mut child = command.spawn().expect("nft is installed");
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let success = child.wait().unwrap().success();
        if !success {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        success
    });
    assert!(done, "{script}");
}

/// The handle of the rule of `chain` whose listed line contains `text`.
pub fn handle(chain: &str, text: &str) -> String {
    let mut command = Command::new(nft_program());
    let output = command.args(["-a", "list", "chain", "inet", "portcullis", chain]).output();
    let listing = String::from_utf8(output.unwrap().stdout).unwrap();
    let line = listing.lines().find(|line| line.contains(text)).expect(text);
    line.rsplit(' ').next().unwrap().to_owned()
}

/// A network namespace of the test's own; `None` where it cannot have one.
pub fn namespace() -> Option<Namespace> {
    let needed = [Requirement::Root, Requirement::Nft];
    available(&needed).then(|| Namespace::new("audit").expect("root may make one"))
}
