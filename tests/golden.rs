//! Golden tests: a directory of manifests in, the ruleset and the diagnostics of `portcullis plan` out.
//!
//! Each directory below `tests/golden` is a case. After a wanted change: `cargo insta review`, or
//! `INSTA_UPDATE=always cargo test --test golden` and look at the difference.

use std::path::Path;
use std::process::Command;

#[test]
fn ruleset() {
    let mut cases = 0;
    insta::glob!("golden/*", |directory| {
        cases += 1;
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(plan(directory));
        });
    });
    assert!(cases >= 10, "only {cases} cases were found");
}

/// Output, diagnostics and exit code, with the directory's own name left out.
fn plan(directory: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["plan", "--node-name", "node-1", "--file", "."])
        .current_dir(directory)
        .env("RUST_LOG", "off")
        .output()
        .expect("portcullis runs");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("the output is UTF-8");
    let code = output.status.code().expect("an exit code");
    format!("{}--- exit code {code}\n{}", text(&output.stdout), text(&output.stderr))
}
