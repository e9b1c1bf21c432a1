//! The manifests of the `DaemonSet`, on a real API server: it takes them without a warning, and the
//! account may do what the daemon does and nothing else.

use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};
use portcullis_integration::controlplane::{ControlPlane, objects};
use portcullis_integration::daemon::{command, follow};
use portcullis_integration::lab::{Lab, eventually, scratch};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Protocol, Server, probe};
use serde_json::{Value, json};

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");
const OVERLAYS: [&str; 3] = ["cluster", "replace-kube-proxy", "kind"];
const LIMIT: Duration = Duration::from_secs(60);
/// The namespace, and everything in it that has a name.
const NAME: &str = "portcullis";

fn ready() -> bool {
    available(&[Requirement::Root, Requirement::Nft, Requirement::ControlPlane])
}

/// What a command wrote that had nothing to complain about.
fn quiet(output: Output) -> Result<String> {
    let complaints = String::from_utf8(output.stderr)?;
    ensure!(output.status.success() && complaints.is_empty(), "{}: {complaints}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn apply(plane: &ControlPlane, overlay: &str, more: &[&str]) -> Result<String> {
    let directory = format!("{MANIFESTS}/overlays/{overlay}");
    let head = ["apply", "--server-side", "--validate=strict", "--kustomize", &directory];
    quiet(plane.kubectl(&[&head, more].concat())?).with_context(|| overlay.to_owned())
}

async fn daemon_set(client: &kube::Client) -> Result<Value> {
    let api = Api::<DaemonSet>::namespaced(client.clone(), NAME);
    Ok(serde_json::to_value(api.get(NAME).await?)?)
}

#[test]
fn the_api_server_takes_every_overlay() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::start()?;
    for overlay in OVERLAYS {
        let said = apply(&plane, overlay, &[])?;
        let count = said.lines().count();
        ensure!(count == 6, "{overlay}: {said}");
        let set = plane.block_on(async |client| daemon_set(&client).await)?;
        let pod = &set["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let port = if overlay == "replace-kube-proxy" { 10356 } else { 10256 };
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            ensure!(container[probe]["httpGet"]["port"] == port, "{overlay}: {}", container[probe]);
        }
        // What is asked for is what there is: the command line is understood.
        let arguments: Vec<&str> =
            container["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let output = command(&[&arguments[..], &["--help"]].concat())?.output()?;
        ensure!(output.status.success(), "{overlay}: {arguments:?}");
        // The address of the API server is in an object that is there.
        for key in ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"] {
            let env = container["env"].as_array().into_iter().flatten();
            let from = { env }
                .find(|variable| variable["name"] == key)
                .map(|variable| &variable["valueFrom"]["configMapKeyRef"])
                .with_context(|| format!("no {key}"))?;
            let object = from["name"].as_str().context("no name")?;
            let path = format!("jsonpath={{.data.{key}}}");
            let get = ["get", "configmap", "--namespace", NAME, object, "--output", &path];
            ensure!(!quiet(plane.kubectl(&get)?)?.is_empty(), "{overlay}: {key}");
        }
    }
    Ok(())
}

#[test]
fn the_account_may_do_what_the_daemon_does() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::start()?;
    apply(&plane, "kind", &[])?;
    let lab = Lab::new(1)?;
    plane.attach(&lab.node)?;
    let _server = Server::start(&lab.pods[0], "web-0", Protocol::Tcp, 8080)?;
    let (namespace, node_port) = plane.block_on(async |client| {
        objects::node(&client, "node-1", &lab.node, &[]).await?;
        let namespace = objects::namespace(&client, "shop").await?;
        objects::pod(&client, &namespace, "web-0", &[("app", "web")], "node-1", &lab.pods[0])
            .await?;
        let spec = json!({
            "type": "NodePort",
            "selector": { "app": "web" },
            "ports": [{ "port": 80, "targetPort": 8080 }],
        });
        let made = objects::service(&client, &namespace, "web", spec).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", 1).await?;
        let ports = made.spec.and_then(|spec| spec.ports).context("no ports")?;
        Ok((namespace, u16::try_from(ports[0].node_port.context("no node port")?)?))
    })?;

    let kubeconfig = plane.kubeconfig_of(NAME, NAME)?;
    let daemon = follow(&lab, &["--kubeconfig", kubeconfig.to_str().context("UTF-8")?])?;
    let to = SocketAddr::from((lab.node.v4, node_port));
    ensure!(probe(&lab.allowed, to, Protocol::Tcp)?.by().is_some(), "{}", daemon.tail());

    // Something that is worth an Event: a process listens where the node port is.
    let _other = Server::start(&lab.node, "other", Protocol::Tcp, node_port)?;
    let events = || {
        plane.block_on(async |client| {
            let api = Api::<Event>::namespaced(client.clone(), &namespace);
            Ok(api.list(&ListParams::default()).await?.items)
        })
    };
    let told = |event: &Event| {
        event.regarding.as_ref().is_some_and(|about| about.name.as_deref() == Some("web"))
            && event.reporting_controller.as_deref() == Some(NAME)
    };
    let told = || events().is_ok_and(|events| events.iter().any(told));
    ensure!(eventually(LIMIT, told), "no Event: {}", daemon.tail());
    let log = daemon.stderr();
    ensure!(!log.contains("orbidden") && !log.contains("cannot publish"), "{log}");
    Ok(())
}

#[test]
fn the_account_may_do_nothing_else() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::start()?;
    apply(&plane, "cluster", &[])?;
    let account = format!("system:serviceaccount:{NAME}:{NAME}");
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": { "namespace": "default" },
    });
    let directory = scratch("review")?;
    let file = directory.path().join("review.json");
    std::fs::write(&file, review.to_string())?;
    let ask = ["create", "--validate=false", "--output", "json", "--as", &account, "--filename"];
    let answer = quiet(plane.kubectl(&[&ask[..], &[file.to_str().context("UTF-8")?]].concat())?)?;
    let answer: Value = serde_json::from_str(&answer)?;
    let rules = answer["status"]["resourceRules"].as_array().context("no rules")?;
    let words = |rule: &Value, field: &str| -> Vec<String> {
        let words = rule[field].as_array().into_iter().flatten();
        words.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut may: Vec<String> = Vec::new();
    for rule in rules {
        for group in words(rule, "apiGroups") {
            // Everybody may ask who they are and what they may do.
            if group.starts_with("auth") {
                continue;
            }
            for resource in words(rule, "resources") {
                let names = words(rule, "resourceNames");
                ensure!(names.is_empty(), "{rule}");
                may.extend(words(rule, "verbs").iter().map(|verb| format!("{verb} {resource}")));
            }
        }
    }
    may.sort();
    let expected = [
        "create events",
        "get services",
        "list endpointslices",
        "list nodes",
        "list servicecidrs",
        "list services",
        "patch events",
        "watch endpointslices",
        "watch nodes",
        "watch servicecidrs",
        "watch services",
    ];
    ensure!(may == expected, "{may:#?}");
    Ok(())
}
