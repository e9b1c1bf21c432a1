//! Topology hints, and endpoints that leave.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Result, ensure};
use portcullis_integration::lab::eventually;
use portcullis_integration::manifest::Endpoint;
use portcullis_integration::traffic::Protocol;
use serde_json::{Value, json};

use super::{ELSEWHERE, HERE, NOTICE, World, answers, exposed, servers, targets};

#[test]
fn hints_and_endpoints_that_leave() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let zones = |names: &[&str]| {
        let zones: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
        json!({ "hints": { "forZones": zones } })
    };
    let nodes = |name: &str| json!({ "hints": { "forNodes": [{ "name": name }] } });
    let leaving = |serving: bool| json!({ "conditions": { "ready": false, "serving": serving, "terminating": true } });
    let ready = || json!({});
    let node = portcullis_integration::daemon::NODE_NAME;
    let [first, second] = HERE;
    // What is said of each endpoint, and who serves.
    let table: Vec<(&str, [Value; 3], Vec<&str>)> = vec![
        ("a zone", [zones(&["here"]), zones(&["there"]), zones(&["there"])], vec![first]),
        (
            "two zones",
            [zones(&["here", "b"]), zones(&["b", "here"]), zones(&["b"])],
            vec![first, second],
        ),
        (
            "no hint of here",
            [zones(&["a"]), zones(&["b"]), zones(&["c"])],
            vec![first, second, ELSEWHERE],
        ),
        (
            "one without hints",
            [zones(&["here"]), ready(), zones(&["b"])],
            vec![first, second, ELSEWHERE],
        ),
        ("a node", [nodes(node), nodes("peer"), nodes("peer")], vec![first]),
        ("nodes before zones", [nodes("peer"), nodes("peer"), nodes(node)], vec![ELSEWHERE]),
        ("some leave", [ready(), leaving(true), leaving(true)], vec![first]),
        ("all leave", [leaving(true), leaving(true), leaving(false)], vec![first, second]),
        ("hints of those who leave", [zones(&["here"]), leaving(true), zones(&["b"])], vec![first]),
    ];
    let mut manifest = exposed(20, lab, &json!({}));
    let endpoints: Vec<[Endpoint; 2]> =
        [Endpoint::of(&lab.pods[0]), Endpoint::of(&lab.pods[1]), Endpoint::elsewhere(lab)].into();
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    for (what, extras, expected) in table {
        manifest.endpoints = endpoints
            .iter()
            .zip(&extras)
            .flat_map(|(both, extra)| {
                both.clone().map(|endpoint| Endpoint { extra: extra.clone(), ..endpoint })
            })
            .collect();
        manifest.write(&world.manifests)?;
        let expected: BTreeSet<String> = expected.into_iter().map(ToOwned::to_owned).collect();
        for to in targets(lab, &manifest, 20) {
            let mut last = BTreeSet::new();
            let settled = eventually(NOTICE, || {
                last = answers(&lab.allowed, to, Protocol::Tcp, 40).unwrap_or_default();
                last == expected
            });
            ensure!(settled, "{what}, {to}: {last:?}, not {expected:?}");
        }
    }
    // The node moves to another zone.
    let node = fs::read_to_string(world.manifests.join("node.json"))?;
    manifest.endpoints = endpoints
        .iter()
        .zip([zones(&["here"]), zones(&["b"]), zones(&["there"])])
        .flat_map(|(both, extra)| both.clone().map(|e| Endpoint { extra: extra.clone(), ..e }))
        .collect();
    manifest.write(&world.manifests)?;
    portcullis_integration::manifest::replace(
        &world.manifests.join("node.json"),
        &node.replace("\"here\"", "\"there\""),
    )?;
    let to = targets(lab, &manifest, 20)[0];
    let moved = || {
        let by = answers(&lab.allowed, to, Protocol::Tcp, 20).unwrap_or_default();
        by == BTreeSet::from([ELSEWHERE.to_owned()])
    };
    ensure!(eventually(NOTICE, moved), "the zone of the node makes no difference");
    Ok(())
}
