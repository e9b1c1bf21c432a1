//! What the command line promises: exit codes, one clear line for what cannot be done, output for
//! machines.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Result, ensure};
use portcullis_integration::binary;
use portcullis_integration::daemon::{NODE_NAME, command, follow, follow_manifests};
use portcullis_integration::lab::{Lab, eventually, scratch};
use portcullis_integration::manifest::{Manifest, Port, replace, write_node};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Protocol, Server, http_get, probe};
use serde_json::json;

const ROOT: &[Requirement] = &[Requirement::Root, Requirement::Nft];

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The output of a command that cannot do its work: exit code 2 and one line that says why.
fn expect_cannot(output: &Output, why: &str) -> Result<()> {
    let stderr = text(&output.stderr);
    let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("portcullis: ")).collect();
    ensure!(output.status.code() == Some(2), "{:?}\n{stderr}", output.status);
    ensure!(said.len() == 1 && said[0].contains(why), "{why:?} is not what was said:\n{stderr}");
    ensure!(!stderr.contains("panicked"), "{stderr}");
    Ok(())
}

#[test]
fn a_path_that_is_not_there() -> Result<()> {
    let output = command(&["plan", "--file", "no/such/path"])?.output()?;
    expect_cannot(&output, "no/such/path")
}

#[test]
fn wrong_usage() -> Result<()> {
    for arguments in [
        &["run", "--nodeport-addresses", "everywhere"][..],
        &["run", "--manifests", "a", "--kubeconfig", "b"],
        &["plan"],
        &["frobnicate"],
    ] {
        let output = command(arguments)?.output()?;
        ensure!(output.status.code() == Some(2), "{arguments:?}: {:?}", output.status);
        ensure!(!output.stderr.is_empty(), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_configuration_of_kube_proxy_is_read() -> Result<()> {
    let directory = scratch("config")?;
    let file = directory.path().join("config.yaml");
    let manifests = directory.path().join("node.json");
    fs::write(
        &manifests,
        r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}"#,
    )?;
    let paths = [&file, &manifests].map(|path| path.to_string_lossy().into_owned());
    let plan = |config: &str, more: &[&str]| -> Result<Output> {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        fs::write(&file, format!("{head}{config}"))?;
        let [file, manifests] = paths.each_ref().map(String::as_str);
        let arguments = [&["plan", "--config", file, "--file", manifests], more].concat();
        Ok(command(&arguments)?.output()?)
    };
    let config = "hostnameOverride: node-1
nodePortAddresses: [192.0.2.0/24]
clusterCIDR: 10.244.0.0/16
mode: ipvs
ipvs: {strictARP: true}
";
    let output = plan(config, &[])?;
    let (ruleset, said) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success(), "{said}");
    ensure!(ruleset.contains("elements = { 192.0.2.0/24 }"), "{ruleset}");
    ensure!(ruleset.contains("elements = { 10.244.0.0/16 }"), "{ruleset}");
    for field in ["mode", "ipvs.strictARP"] {
        ensure!(said.contains(&format!("field=\"{field}\"")), "{field} is not named: {said}");
    }
    // What is asked for on the command line counts.
    let ruleset = text(&plan(config, &["--nodeport-addresses", "198.51.100.0/24"])?.stdout);
    ensure!(ruleset.contains("elements = { 198.51.100.0/24 }"), "{ruleset}");
    expect_cannot(&plan("clusterCIDR: pods", &[])?, "clusterCIDR: \"pods\" is not a CIDR")?;
    fs::remove_file(&file)?;
    let output = command(&["plan", "--config", &paths[0], "--file", &paths[1]])?.output()?;
    expect_cannot(&output, "config.yaml")
}

#[test]
fn external_addresses_can_be_closed() -> Result<()> {
    let directory = scratch("external")?;
    let file = directory.path().join("config.yaml");
    fs::write(
        &file,
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
         featureGates: {AllowServiceExternalIPs: false}\n",
    )?;
    let config = file.to_string_lossy();
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/load-balancer");
    for (more, served) in
        [(&[][..], true), (&["--no-external-ips"], false), (&["--config", &config], false)]
    {
        let arguments = [&["plan", "--node-name", "node-1", "--file", manifests], more].concat();
        let output = command(&arguments)?.output()?;
        let (ruleset, said) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "{more:?}: {said}");
        ensure!(ruleset.contains("198.51.100.7") == served, "{more:?}: {ruleset}");
        ensure!(said.contains("spec.externalIPs: not served") != served, "{more:?}: {said}");
    }
    Ok(())
}

#[test]
fn limits_of_connection_tracking_are_set() -> Result<()> {
    if !available(ROOT) {
        return Ok(());
    }
    let lab = Lab::new(1)?;
    let manifests = lab.directory().join("manifests");
    fs::create_dir(&manifests)?;
    write_node(&lab, &manifests)?;
    let limits = || -> Result<[String; 3]> {
        let of = |key: &str| lab.node.sysctl(&format!("net.netfilter.nf_conntrack_{key}"));
        Ok([of("tcp_timeout_established")?, of("tcp_timeout_close_wait")?, of("udp_timeout")?]
            .map(|value| value.trim().to_owned()))
    };
    let before = limits()?;
    let udp = before[2].clone();
    let path = manifests.to_string_lossy();
    let tuned = ["--manifests", &path, "--node-name", NODE_NAME, "--conntrack-udp-timeout=77s"];
    // Not where the process leaves again, and not without the rights to go on.
    let once = command(&[&["run", "--once"], &tuned[..]].concat())?;
    let output = lab.node.output(once)?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let unprivileged = unprivileged(&[&["run"], &tuned[..]].concat())?;
    expect_cannot(&lab.node.output(unprivileged)?, "CAP_NET_ADMIN")?;
    ensure!(limits()? == before, "{:?}, not {before:?}", limits());

    let run = |more: &[&str], expected: [&str; 3], score: &str| -> Result<()> {
        let directory = manifests.to_string_lossy().into_owned();
        let arguments = [&["--manifests", &directory], more].concat();
        let daemon = follow(&lab, &arguments)?;
        let set = || limits().is_ok_and(|limits| limits == expected);
        ensure!(eventually(Duration::from_secs(10), set), "{:?}, not {expected:?}", limits());
        let now = fs::read_to_string(format!("/proc/{}/oom_score_adj", daemon.pid()))?;
        ensure!(now.trim() == score, "oom_score_adj is {}, not {score}", now.trim());
        daemon.terminate(Duration::from_secs(10))?;
        Ok(())
    };
    let own = fs::read_to_string("/proc/self/oom_score_adj")?;
    run(&[], ["86400", "3600", &udp], own.trim())?;
    let arguments = [
        "--conntrack-tcp-timeout-established=2h",
        "--conntrack-tcp-timeout-close-wait=0s",
        "--conntrack-udp-timeout=1m30s",
        "--oom-score-adj=500",
    ];
    run(&arguments, ["7200", "3600", "90"], "500")
}

#[test]
fn a_log_filter_that_is_not_understood() -> Result<()> {
    let output = command(&["version"])?.env("RUST_LOG", "portcullis=loud").output()?;
    expect_cannot(&output, "RUST_LOG")?;
    let output = command(&["version"])?.env("RUST_LOG", "portcullis=trace").output()?;
    ensure!(output.status.success(), "{:?}", output.status);
    Ok(())
}

#[test]
fn output_for_machines() -> Result<()> {
    let output = command(&["version", "--output", "json"])?.output()?;
    let version: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(version["version"].is_string(), "{version}");

    let directory = scratch("cli")?;
    fs::write(directory.path().join("bad.yaml"), "kind: Service\napiVersion: v1\n")?;
    let path = directory.path().to_str().expect("UTF-8");
    let output = command(&["plan", "--file", path, "--output", "json"])?.output()?;
    ensure!(output.status.code() == Some(1), "{:?}", output.status);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(plan["ruleset"].as_str().is_some_and(|text| text.starts_with("table inet portcullis")));
    let diagnostic = &plan["diagnostics"][0];
    ensure!(diagnostic["field"].as_str().is_some_and(|f| f.contains("metadata.name")), "{plan}");

    for shell in ["bash", "zsh", "fish"] {
        let output = command(&["completions", shell])?.output()?;
        ensure!(text(&output.stdout).contains("portcullis"), "{shell}");
    }
    Ok(())
}

#[test]
fn a_reader_that_leaves_is_no_error() -> Result<()> {
    let directory = scratch("cli")?;
    let script = format!(
        "{} plan --file {} | head -n 1",
        binary::path()?.display(),
        directory.path().display()
    );
    let output = Command::new("bash").args(["-o", "pipefail", "-c", &script]).output()?;
    ensure!(output.status.success(), "{:?} {}", output.status, text(&output.stderr));
    Ok(())
}

/// The program as root without root's capabilities.
fn unprivileged(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new("setpriv");
    command
        .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"])
        .arg(binary::path()?)
        .args(arguments);
    Ok(command)
}

#[test]
fn without_rights() -> Result<()> {
    if !available(ROOT) {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let directory = scratch("rights")?;
    for arguments in [&["run", "--manifests", "/tmp", "--once"][..], &["cleanup"]] {
        let mut unprivileged = unprivileged(arguments)?;
        unprivileged.current_dir(directory.path());
        expect_cannot(&lab.node.output(unprivileged)?, "CAP_NET_ADMIN")?;
    }
    Ok(())
}

/// As in the container image: nobody is root, and the right comes with the program's file.
#[test]
fn rights_of_the_programs_file() -> Result<()> {
    if !available(ROOT) || !available(&[Requirement::Setcap]) {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let directory = scratch("rights")?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let manifests = directory.path().join("manifests");
    fs::create_dir(&manifests)?;
    write_node(&lab, &manifests)?;
    let program = directory.path().join("portcullis");
    fs::copy(binary::path()?, &program)?;
    let run = ["run", "--once", "--node-name", NODE_NAME, "--manifests"];
    let run = [&run[..], &[manifests.to_str().expect("UTF-8")]].concat();
    let output = |launcher: &[&str], arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65532", "--regid=65532", "--clear-groups"]);
        command.args(launcher).arg("--").arg(&program).args(arguments);
        lab.node.output(command)
    };
    let withheld = ["--bounding-set=-net_admin", "--inh-caps=-net_admin"];
    expect_cannot(&output(&[], &run)?, "CAP_NET_ADMIN")?;
    let path = program.to_str().expect("UTF-8");
    lab.node.run(&["setcap", "cap_net_admin=p", path])?;
    expect_cannot(&output(&withheld, &run)?, "CAP_NET_ADMIN")?;
    ensure!(output(&withheld, &["version"])?.status.success(), "does not start without the right");
    let done = output(&[], &run)?;
    ensure!(done.status.success(), "{}", text(&done.stderr));
    ensure!(text(&done.stdout).contains("table inet portcullis made"), "{}", text(&done.stdout));
    Ok(())
}

#[test]
fn one_daemon_on_a_node() -> Result<()> {
    if !available(ROOT) {
        return Ok(());
    }
    let lab = Lab::new(1)?;
    let manifests = lab.directory().join("manifests");
    fs::create_dir(&manifests)?;
    write_node(&lab, &manifests)?;
    let web =
        Manifest::new("web", 10, &lab).port(Port::new("http", Protocol::Tcp, 80, 8080, 30080));
    web.write(&manifests)?;
    let path = manifests.to_str().expect("UTF-8");
    let daemon = follow_manifests(&lab, &manifests)?;
    let before = lab.node.run(&["nft", "list", "ruleset"])?;

    let once = ["run", "--once", "--node-name", "other", "--manifests", path];
    expect_cannot(&lab.node.output(command(&once)?)?, "only one portcullis on a node")?;
    expect_cannot(&lab.node.output(command(&["cleanup"])?)?, "end the daemon first")?;
    let after = lab.node.run(&["nft", "list", "ruleset"])?;
    ensure!(before == after, "the second one changed something:\n{after}");

    let status = daemon.terminate(Duration::from_secs(10))?;
    ensure!(status.success(), "{status:?}");
    for expected in ["removed", "nothing to remove"] {
        let output = lab.node.output(command(&["cleanup"])?)?;
        ensure!(output.status.success() && text(&output.stdout).contains(expected));
    }
    Ok(())
}

/// The program with its standard error at a path.
fn logging_to(path: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec "$@" 2> "$0""#]).arg(path).arg(binary::path()?).args(arguments);
    Ok(command)
}

/// A pipe with a name, and both of its ends.
fn pipe(path: &Path) -> Result<File> {
    let status = Command::new("mkfifo").arg(path).status()?;
    ensure!(status.success(), "mkfifo: {status}");
    Ok(File::options().read(true).write(true).open(path)?)
}

#[test]
fn errors_that_nobody_reads() -> Result<()> {
    for arguments in [&["plan", "--file", "no/such/path"][..], &["audit", "--config", "no/such"]] {
        let output = logging_to(Path::new("/dev/full"), arguments)?.output()?;
        ensure!(output.status.code() == Some(2), "{arguments:?}: {:?}", output.status);
    }
    Ok(())
}

#[test]
fn the_daemon_needs_nobody_to_read_its_logs() -> Result<()> {
    const NOTICE: Duration = Duration::from_secs(15);
    const NODE_PORT: u16 = 30080;
    if !available(ROOT) {
        return Ok(());
    }
    let faulty = (0..1000).map(|number| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "namespace": "shop", "name": format!("bad-{number}") },
            "spec": { "clusterIP": "nonsense", "ports": [{ "port": 80 }] },
        })
    });
    let faulty = json!({ "apiVersion": "v1", "kind": "List", "items": faulty.collect::<Vec<_>>() });
    for case in ["full", "gone", "stuck"] {
        let lab = Lab::new(1)?;
        let manifests = lab.directory().join("manifests");
        fs::create_dir(&manifests)?;
        write_node(&lab, &manifests)?;
        let _server = Server::start(&lab.pods[0], "pod-1", Protocol::Tcp, 8080)?;
        let file = lab.directory().join("logs");
        let (stderr, mut reader) = match case {
            "full" => (Path::new("/dev/full"), None),
            _ => (&*file, Some(pipe(&file)?)),
        };
        let directory = manifests.to_str().expect("UTF-8");
        let arguments = ["run", "--node-name", NODE_NAME, "--manifests", directory];
        let mut daemon = lab.spawn(&logging_to(stderr, &arguments)?, "portcullis")?;
        let metric = |line: &str| {
            let answer = http_get(&lab.node, ([127, 0, 0, 1], 10249), "/metrics");
            answer.is_ok_and(|answer| answer.body.lines().any(|metric| metric == line))
        };
        ensure!(eventually(NOTICE, || metric("portcullis_programmed 1")), "{case}: not started");
        if case == "gone" {
            reader = None;
        }
        // A line for each of them: more than a pipe holds.
        replace(&manifests.join("bad.json"), &faulty.to_string())?;
        let found = || metric("portcullis_object_errors 1000");
        ensure!(eventually(NOTICE, found), "{case}: {:?}", daemon.is_running());
        let port = Port::new("http", Protocol::Tcp, 80, 8080, NODE_PORT);
        Manifest::new("web", 10, &lab).port(port).write(&manifests)?;
        let to = (lab.node.v4, NODE_PORT);
        let served = || {
            let outcome = probe(&lab.allowed, to, Protocol::Tcp);
            outcome.is_ok_and(|outcome| outcome.by() == Some("pod-1"))
        };
        ensure!(eventually(NOTICE, served), "{case}: a change does not come about");
        let status = daemon.terminate(NOTICE)?;
        ensure!(status.success(), "{case}: {status}");
        drop(reader);
    }
    Ok(())
}

#[test]
fn logs_for_machines() -> Result<()> {
    if !available(ROOT) {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let manifests = lab.directory().join("manifests");
    fs::create_dir(&manifests)?;
    fs::write(manifests.join("bad.yaml"), "kind: [")?;
    let path = manifests.to_str().expect("UTF-8");
    let arguments =
        ["--log-format", "json", "run", "--once", "--node-name", "n", "--manifests", path];
    let output = lab.node.output(command(&arguments)?)?;
    ensure!(output.status.code() == Some(1), "{:?}", output.status);
    let logs = text(&output.stderr);
    ensure!(!logs.is_empty());
    for line in logs.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        ensure!(line["level"].is_string() && line["message"].is_string(), "{line}");
    }
    Ok(())
}
