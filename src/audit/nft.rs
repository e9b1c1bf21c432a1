//! Running `nft`, and getting a listing out of it that can be read.
//!
//! `nftables::helper` would wait without end, and takes nothing but UTF-8, which names need not be.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;

/// How to run `nft`.
#[derive(Clone, Debug)]
pub struct Nft {
    /// The program: a path, or a name to be found in `PATH`.
    pub program: OsString,
    /// How long all of its runs may take together. On a node with 44,000 Services of kube-proxy's
    /// one listing takes a minute.
    pub timeout: Duration,
}

impl Default for Nft {
    fn default() -> Nft {
        Nft { program: "nft".into(), timeout: Duration::from_secs(180) }
    }
}

/// Why the kernel's ruleset could not be read.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such program: install nftables on the node, or in the container.
    #[error("nft is not installed: there is no program {:?}", .program)]
    NotInstalled {
        /// The program that was looked for.
        program: OsString,
    },
    /// The program is there but could not be run.
    #[error("cannot run {:?}", .program)]
    Run {
        /// The program.
        program: OsString,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The caller may not list the ruleset: run as root, or with `CAP_NET_ADMIN`.
    #[error("not permitted to list the ruleset (CAP_NET_ADMIN is needed): nft says {stderr:?}")]
    NotPermitted {
        /// What nft wrote.
        stderr: String,
    },
    /// nft failed for another reason, which it says.
    #[error("`nft {command}` failed ({status}): {stderr:?}")]
    Failed {
        /// nft's arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote.
        stderr: String,
    },
    /// nft did not end in time and was killed.
    #[error("`nft {command}` did not end within {} seconds", .timeout.as_secs())]
    TimedOut {
        /// nft's arguments.
        command: String,
        /// How long all runs may take together.
        timeout: Duration,
    },
    /// nft wrote something that is not what it is documented to write (`libnftables-json(5)`).
    #[error("cannot understand what `nft {command}` wrote")]
    NotUnderstood {
        /// nft's arguments.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// What nft lists.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// One document behind the other, as `libnftables-json(5)` describes them.
    pub json: String,
    /// A listing for people, of which only rules and flags of tables are read: what `json` has no
    /// rules of.
    pub plain: Option<String>,
}

/// A document: an array of objects, each of which is understood or not on its own.
#[derive(Deserialize)]
pub(super) struct Document<'a> {
    #[serde(borrow)]
    pub nftables: Vec<&'a RawValue>,
}

/// The documents in what nft wrote.
pub(super) fn documents(json: &str) -> Result<Vec<Document<'_>>, serde_json::Error> {
    serde_json::Deserializer::from_str(json).into_iter().collect()
}

/// Kind and body of an object, which is `{"KIND": BODY}`.
pub(super) fn entry(raw: &RawValue) -> Result<(String, &RawValue), serde_json::Error> {
    let object: BTreeMap<String, &RawValue> = serde_json::from_str(raw.get())?;
    object.into_iter().next().ok_or_else(|| serde::de::Error::custom("an object without a kind"))
}

/// The tables, without what is in them.
const TABLES: &[&str] = &["-j", "list", "tables"];
/// `-n`: numbers instead of names. Names come from the files of the machine or container that nft
/// runs in (`/etc/protocols`, `/etc/iproute2/rt_marks`).
const EVERYTHING: &[&str] = &["-n", "-j", "list", "ruleset"];
/// Everything but tables and rules ...
const WITHOUT_TABLES: &[&str] = &["-n", "-j", "list chains; list sets; list maps"];
/// ... and tables and rules, without the elements of sets.
const PLAIN: &[&str] = &["-t", "list", "ruleset"];

impl Nft {
    /// Lists the ruleset of the network namespace of this thread.
    ///
    /// The JSON of nft 1.0.6 is broken for a table that has exactly one flag, as ours has when
    /// nobody owns it (`persist`): `table_flags_json` uses memory that it has just freed, and what
    /// comes out is a listing that ends there, or a wrong word. Then everything is listed that
    /// prints no tables, and rules come from the listing for people.
    ///
    /// # Errors
    /// Whatever keeps nft from listing; see [`enum@Error`].
    pub fn list(&self) -> Result<Listing, Error> {
        let deadline = Instant::now() + self.timeout;
        if self.whole(TABLES, deadline)?.is_some()
            && let Some(json) = self.whole(EVERYTHING, deadline)?
        {
            return Ok(Listing { json, plain: None });
        }
        let json = self.run(WITHOUT_TABLES, deadline)?;
        Ok(Listing { json, plain: Some(self.run(PLAIN, deadline)?) })
    }

    /// What nft wrote, unless it is broken.
    fn whole(&self, arguments: &[&str], deadline: Instant) -> Result<Option<String>, Error> {
        match self.run(arguments, deadline) {
            Ok(json) => Ok(is_whole(&json).then_some(json)),
            // Died of a signal, as programs that use freed memory do.
            Err(Error::Failed { status, .. }) if status.code().is_none() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs nft once and gives what it wrote.
    fn run(&self, arguments: &[&str], deadline: Instant) -> Result<String, Error> {
        let mut command = Command::new(&self.program);
        // Error messages are looked at.
        command.args(arguments).env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = || self.program.clone();
        let mut child = command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NotInstalled { program: program() },
            _ => Error::Run { program: program(), source },
        })?;
        let ended = finish(&mut child, deadline);
        if ended.is_err() || matches!(ended, Ok(None)) {
            // It may have ended meanwhile; either way nothing of it may stay.
            let _ = child.kill();
            let _ = child.wait();
        }
        let command = || arguments.join(" ");
        let ended = ended.map_err(|source| Error::Run { program: program(), source })?;
        let Some((status, stdout, stderr)) = ended else {
            return Err(Error::TimedOut { command: command(), timeout: self.timeout });
        };
        if status.success() {
            return Ok(text(stdout));
        }
        let stderr = text(stderr).trim().to_owned();
        if stderr.contains("Operation not permitted") {
            return Err(Error::NotPermitted { stderr });
        }
        Err(Error::Failed { command: command(), status, stderr })
    }
}

type Ended = (ExitStatus, Vec<u8>, Vec<u8>);

/// Reads all that `child` writes and waits for its end; `None` when the deadline comes first.
fn finish(child: &mut Child, deadline: Instant) -> io::Result<Option<Ended>> {
    let (send, receive) = mpsc::channel();
    let outputs: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|pipe| Box::new(pipe) as _),
        child.stderr.take().map(|pipe| Box::new(pipe) as _),
    ];
    for (index, pipe) in outputs.into_iter().enumerate() {
        let Some(mut pipe) = pipe else { continue };
        let send = send.clone();
        // Ends with the child, which is killed when it does not end by itself.
        std::thread::Builder::new().name("nft output".to_owned()).spawn(move || {
            let mut bytes = Vec::new();
            let result = pipe.read_to_end(&mut bytes).map(|_| bytes);
            // Nobody listens any more when the deadline has come.
            let _ = send.send((index, result));
        })?;
    }
    drop(send);
    let mut written = [Vec::new(), Vec::new()];
    for _ in 0..written.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        match receive.recv_timeout(left) {
            Ok((index, bytes)) => written[index] = bytes?,
            Err(mpsc::RecvTimeoutError::Timeout) => return Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    // Its pipes are closed, so this is a matter of microseconds.
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            let [stdout, stderr] = written;
            return Ok(Some((status, stdout, stderr)));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}

/// Names may hold any byte; what is not UTF-8 is another's, and its place is all we need.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

/// Whether a listing is JSON to its end, and the flags of its tables are flags.
fn is_whole(json: &str) -> bool {
    #[derive(Deserialize)]
    struct Table {
        #[serde(default)]
        flags: Value,
    }
    let Ok(documents) = documents(json) else { return false };
    let mut objects = documents.iter().flat_map(|document| &document.nftables);
    !documents.is_empty()
        && objects.all(|raw| match entry(raw) {
            Ok((kind, body)) if kind == "table" => serde_json::from_str(body.get())
                .is_ok_and(|table: Table| flags(&table.flags).is_some()),
            Ok(_) => true,
            Err(_) => false,
        })
}

/// The flags of a table; `None` if something else stands there. What nft 1.0.6 does not know it
/// calls `unknown`.
pub(super) fn flags(value: &Value) -> Option<Vec<&str>> {
    let known =
        |value: &Value| matches!(value.as_str(), Some("dormant" | "owner" | "persist" | "unknown"));
    match value {
        Value::Null => Some(Vec::new()),
        Value::String(flag) if known(value) => Some(vec![flag]),
        Value::Array(flags) if flags.iter().all(known) => {
            Some(flags.iter().filter_map(Value::as_str).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// A program cannot be run while somebody has it open for writing, and for a moment a child
    /// that another test starts has what this process has.
    static START: Mutex<()> = Mutex::new(());

    /// A program that stands in for nft; it goes with the value.
    struct Script(PathBuf);

    impl Script {
        fn new(name: &str, body: &str) -> Script {
            let path =
                std::env::temp_dir().join(format!("portcullis-nft-{}-{name}", std::process::id()));
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
            Script(path)
        }

        fn list(&self, timeout: Duration) -> Result<Listing, Error> {
            list(self.0.clone().into(), timeout)
        }
    }

    impl Drop for Script {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn list(program: OsString, timeout: Duration) -> Result<Listing, Error> {
        let _start = START.lock().unwrap_or_else(PoisonError::into_inner);
        Nft { program, timeout }.list()
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn errors_say_what_to_do() {
        let missing = list("/nonexistent/nft".into(), LONG);
        let missing = missing.unwrap_err();
        assert!(matches!(missing, Error::NotInstalled { .. }), "{missing:?}");
        assert_eq!(
            missing.to_string(),
            "nft is not installed: there is no program \"/nonexistent/nft\""
        );

        let denied = Script::new(
            "denied",
            "echo 'netlink: Error: cache initialization failed: Operation not permitted' >&2; exit 1",
        );
        let denied = denied.list(LONG).unwrap_err();
        assert!(matches!(denied, Error::NotPermitted { .. }), "{denied:?}");

        let failing =
            Script::new("failing", "echo 'no such luck' >&2; exit 3").list(LONG).unwrap_err();
        assert!(matches!(failing, Error::Failed { .. }), "{failing:?}");
        assert!(failing.to_string().contains("no such luck"), "{failing}");

        let hanging = Script::new("hanging", "exec sleep 1000").list(Duration::from_millis(50));
        let hanging = hanging.unwrap_err();
        assert!(matches!(hanging, Error::TimedOut { .. }), "{hanging:?}");
        // Its pipes are closed, but it does not end.
        let silent =
            Script::new("silent", "exec sleep 1000 >&- 2>&-").list(Duration::from_millis(50));
        let silent = silent.unwrap_err();
        assert!(matches!(silent, Error::TimedOut { .. }), "{silent:?}");
    }

    #[test]
    fn more_than_a_pipe_holds_is_read() {
        let body = r#"printf '{"nftables": [{"x": {"y": "'; head -c 300000 /dev/zero | tr '\0' z
            head -c 300000 /dev/zero >&2
            printf '"}}]}'"#;
        let listing = Script::new("large", body).list(LONG).unwrap();
        assert!(listing.json.len() > 300_000);
        assert!(listing.plain.is_none());
    }

    #[test]
    fn what_is_broken_is_listed_in_parts() {
        // What nft 1.0.6 was seen to write of a table with one flag; and a death by a signal.
        for (name, broken) in [
            ("ends", r#"echo '{"nftables": [{"table": {"name": "t", "flags": '"#),
            (
                "wrong",
                r#"echo '{"nftables": [{"table": {"name": "t", "flags": "Lester Gooch #5"}}]}'"#,
            ),
            ("dies", "kill -SEGV $$"),
        ] {
            let body = format!(
                r#"case "$*" in
                    *ruleset) case "$1" in -t) echo people; exit;; esac;;
                    *maps) printf '{{"nftables": []}}\n{{"nftables": []}}'; exit;;
                    *tables) test {name} = ends && echo '{{"nftables": []}}' && exit;;
                esac
                {broken}"#
            );
            let listing = Script::new(name, &body).list(LONG).unwrap();
            assert_eq!(listing.plain.as_deref(), Some("people\n"), "{name}");
            assert_eq!(documents(&listing.json).unwrap().len(), 2, "{name}");
        }
    }

    #[test]
    fn flags_of_tables_tell_what_is_broken() {
        for (flags, expected) in [
            ("null", Some(vec![])),
            (r#""persist""#, Some(vec!["persist"])),
            (r#"["persist"]"#, Some(vec!["persist"])),
            (r#"["owner", "unknown"]"#, Some(vec!["owner", "unknown"])),
            (r#"["dormant", "persist"]"#, Some(vec!["dormant", "persist"])),
            (r#""inet""#, None),
            (r#"["inet"]"#, None),
            ("4", None),
        ] {
            let value: Value = serde_json::from_str(flags).unwrap();
            assert_eq!(super::flags(&value), expected, "{flags}");
            let listing = format!(r#"{{"nftables": [{{"table": {{"flags": {flags}}}}}]}}"#);
            assert_eq!(is_whole(&listing), expected.is_some(), "{flags}");
            assert!(!is_whole(&listing[..listing.len() - 2]), "{flags}");
        }
        assert!(!is_whole(""));
    }
}
