//! Taking a node over from the real kube-proxy: no connection fails on the way, open ones go on, and
//! nothing of kube-proxy stays.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::takeover::is_kube_proxys;
use portcullis_integration::controlplane::{ControlPlane, objects};
use portcullis_integration::daemon::{NODE_NAME, command, follow_cluster};
use portcullis_integration::lab::{FAMILIES, Lab, eventually};
use portcullis_integration::manifest::write_node;
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Flow, Outcome, Protocol, Server, probe};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const ROOT: [Requirement; 3] = [Requirement::Root, Requirement::Nft, Requirement::ControlPlane];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

#[test]
fn from_nftables_mode() -> Result<()> {
    if !available(&ROOT) {
        return Ok(());
    }
    let removed = ["table ip kube-proxy: removed", "table ip6 kube-proxy: removed"];
    take_over("takeover-nftables", "nftables", Some(&removed))
}

#[test]
fn from_iptables_mode() -> Result<()> {
    if !available(&ROOT) || !available(&[Requirement::Iptables]) {
        return Ok(());
    }
    take_over("takeover-iptables", "iptables", Some(&["table nat: ", "table filter: "]))
}

#[test]
fn what_cannot_be_removed_is_said() -> Result<()> {
    if !available(&ROOT[..2]) {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let manifests = lab.directory().join("manifests");
    fs::create_dir(&manifests)?;
    write_node(&lab, &manifests)?;
    let path = manifests.to_str().context("a path in UTF-8")?;
    let once = command(&["run", "--once", "--node-name", NODE_NAME, "--manifests", path])?;
    let output = lab.node.output(once)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lab.node.nft(
        "add table ip kube-proxy
        add table ip nat
        add chain ip nat KUBE-SERVICES",
    )?;
    lab.node.ip(&["link add kube-ipvs0 type veth peer name other"])?;

    // All the programs that there are.
    let programs = lab.directory().join("programs");
    fs::create_dir(&programs)?;
    let install = |name: &str, script: &str| -> Result<()> {
        let file = programs.join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n"))?;
        Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
    };
    let cleanup = |code: i32, said: &[&str]| -> Result<()> {
        let mut cleanup = command(&["cleanup", "--kube-proxy"])?;
        cleanup.env("PATH", &programs);
        let output = lab.node.output(cleanup)?;
        let all = [output.stdout, output.stderr].concat();
        let all = String::from_utf8_lossy(&all);
        ensure!(output.status.code() == Some(code), "{:?}: {all}", output.status);
        for expected in said {
            ensure!(all.contains(expected), "not {expected:?}: {all}");
        }
        ensure!(!all.contains("ip6tables-nft"), "{all}");
        Ok(())
    };
    // Whether there are such tables depends on the machine.
    install("iptables-legacy-save", "")?;
    install("ip6tables-legacy-save", "")?;
    let stays = "interface kube-ipvs0 stays";
    let missing = [
        "table ip kube-proxy: removed",
        "cannot remove kube-proxy's chains: not installed: iptables-nft-save",
        "cannot delete the virtual servers of IPVS: not installed: ipvsadm",
        "cannot list ipsets: not installed: ipset",
        stays,
    ];
    cleanup(2, &missing)?;
    let chains = lab.node.run(&["nft", "list", "chains", "ip"])?;
    ensure!(chains.matches("KUBE-SERVICES").count() == 1, "{chains}");
    lab.node.nft("delete table ip nat")?;

    install("ipvsadm", "echo no such module >&2; exit 3")?;
    install("ipset", "[ $1 = destroy ] || echo KUBE-CLUSTER-IP")?;
    let failed =
        "cannot delete the virtual servers of IPVS: ipvsadm: exit status: 3: no such module";
    cleanup(2, &[failed, "ipset KUBE-CLUSTER-IP: removed", stays])?;
    lab.node.ip(&["link show kube-ipvs0"])?;

    install("ipvsadm", "")?;
    install("ip", "PATH=/usr/sbin:/usr/bin:/sbin:/bin exec ip \"$@\"")?;
    cleanup(0, &["IPVS virtual servers: removed", "interface kube-ipvs0: removed"])?;
    ensure!(lab.node.ip(&["link show kube-ipvs0"]).is_err(), "the interface is there");
    cleanup(0, &["nothing of kube-proxy is there"])
}

/// Where the programs of iptables are in kube-proxy's image and not in ours.
#[test]
fn by_kube_proxys_own_cleanup() -> Result<()> {
    if !available(&ROOT) || !available(&[Requirement::Iptables]) {
        return Ok(());
    }
    take_over("takeover-own-iptables", "iptables", None)?;
    take_over("takeover-own-nftables", "nftables", None)
}

/// `removed` is in what `cleanup` prints; if there is none, kube-proxy removes it by itself.
fn take_over(name: &str, mode: &str, removed: Option<&[&str]>) -> Result<()> {
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(2)?;
    plane.attach(&lab.node)?;
    let mut servers = Vec::new();
    for protocol in PROTOCOLS {
        for pod in &lab.pods {
            servers.push(Server::start(pod, pod.name(), protocol, 8080)?);
        }
    }
    let to = plane.block_on(async |client| {
        objects::node(&client, name, &lab.node, &[]).await?;
        let namespace = objects::namespace(&client, name).await?;
        for (number, pod) in lab.pods.iter().enumerate() {
            let pod_name = format!("web-{number}");
            objects::pod(&client, &namespace, &pod_name, &[("app", "web")], name, pod).await?;
        }
        let spec = json!({
            "type": "NodePort",
            "selector": { "app": "web" },
            "ports": [
                { "name": "tcp", "port": 80, "targetPort": 8080 },
                { "name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP" },
            ],
        });
        let made = objects::service(&client, &namespace, "web", spec).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", lab.pods.len()).await?;
        let spec = made.spec.context("no spec")?;
        let ports = spec.ports.context("no ports")?;
        let mut to = Vec::new();
        for (protocol, port) in PROTOCOLS.into_iter().zip(&ports) {
            for ip in spec.cluster_ips.iter().flatten() {
                to.push((SocketAddr::new(ip.parse()?, 80), protocol));
            }
            let node_port = u16::try_from(port.node_port.context("no node port")?)?;
            for family in FAMILIES {
                to.push((SocketAddr::new(lab.node.address(family), node_port), protocol));
            }
        }
        Ok(to)
    })?;
    let cleanup = || -> Result<(Option<i32>, String)> {
        let output = lab.node.output(command(&["cleanup", "--kube-proxy"])?)?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned()))
    };

    let kube_proxy = plane.start_kube_proxy(&lab.node, name, mode)?;
    let served = |(to, protocol): &(SocketAddr, Protocol)| {
        probe(&lab.allowed, *to, *protocol).is_ok_and(|outcome| outcome.by().is_some())
    };
    ensure!(eventually(LIMIT, || to.iter().all(served)), "kube-proxy: {}", kube_proxy.tail());
    let (code, said) = cleanup()?;
    ensure!(code == Some(2) && said.contains("start portcullis first"), "{code:?}: {said}");
    let mut flows: Vec<Flow> = to
        .iter()
        .map(|(to, protocol)| Flow::open(&lab.allowed, *to, *protocol))
        .collect::<Result<_>>()?;

    let (over, asked) = (AtomicBool::new(false), AtomicU32::new(0));
    let failed = std::thread::scope(|scope| -> Result<Vec<String>> {
        // New connections all the while.
        let clients = scope.spawn(|| -> Result<Vec<String>> {
            let mut failed = Vec::new();
            while !over.load(Ordering::Relaxed) {
                for (to, protocol) in &to {
                    let outcome = probe(&lab.allowed, *to, *protocol)?;
                    asked.fetch_add(1, Ordering::Relaxed);
                    if !matches!(outcome, Outcome::Answered { .. }) {
                        failed.push(format!("{to} {protocol:?}: {outcome:?}"));
                    }
                }
            }
            Ok(failed)
        });
        let taken = (|| -> Result<()> {
            let _daemon = follow_cluster(&lab, plane, name)?;
            let (code, said) = cleanup()?;
            ensure!(code == Some(2) && said.contains("kube-proxy runs"), "{code:?}: {said}");
            kube_proxy.terminate(LIMIT)?;
            if let Some(removed) = removed {
                let (code, said) = cleanup()?;
                ensure!(code == Some(0), "{code:?}: {said}");
                for expected in removed {
                    ensure!(said.contains(expected), "not {expected:?}: {said}");
                }
            } else {
                let output = plane.kube_proxy_cleanup(&lab.node)?;
                let said = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "{}: {said}", output.status);
            }
            let (code, said) = cleanup()?;
            ensure!(
                (code, &*said) == (Some(0), "nothing of kube-proxy is there\n"),
                "{code:?}: {said}"
            );
            // Some more without it.
            let enough = asked.load(Ordering::Relaxed) + 200;
            ensure!(eventually(LIMIT, || asked.load(Ordering::Relaxed) > enough), "too slow");
            for flow in &mut flows {
                ensure!(flow.alive()?, "a flow that kube-proxy translated ended");
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        let failed = clients.join().expect("no panic")?;
        taken.map(|()| failed)
    })?;
    let asked = asked.into_inner();
    ensure!(failed.is_empty(), "{} of {asked} connections failed: {failed:?}", failed.len());
    let ruleset = lab.node.run(&["nft", "list", "tables"])?;
    ensure!(!ruleset.contains("kube-proxy"), "{ruleset}");
    if mode == "iptables" {
        for program in [
            "iptables-nft-save",
            "iptables-legacy-save",
            "ip6tables-nft-save",
            "ip6tables-legacy-save",
        ] {
            let listing = lab.node.run(&[program])?;
            let chains = listing.lines().filter_map(|line| line.strip_prefix(':'));
            let mut names = chains.filter_map(|chain| chain.split(' ').next());
            ensure!(!names.any(is_kube_proxys), "{program}: {listing}");
        }
    }
    println!("{mode}: {asked} connections, none failed");
    Ok(())
}
