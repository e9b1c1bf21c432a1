//! How an endpoint is chosen: by affinity, by a hash of the client's address, by weight.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis_integration::lab::{FAMILIES, eventually};
use portcullis_integration::manifest::{Endpoint, replace};
use portcullis_integration::traffic::{Protocol, distribution, probe_many};
use serde_json::json;

use super::{ELSEWHERE, HERE, NOTICE, PROTOCOLS, World, answers, exposed, servers, targets};

#[test]
fn clients_keep_their_endpoint() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let sticky = json!({ "sessionAffinity": "ClientIP" });
    let mut manifest = exposed(20, lab, &sticky);
    manifest.endpoints = lab.pods.iter().flat_map(Endpoint::of).collect();
    manifest.endpoints.extend(Endpoint::elsewhere(lab));
    manifest.write(&world.manifests)?;
    let daemon = world.daemon(&["--node-cidr"])?;

    let clients = [&lab.allowed, &lab.refused, &lab.node];
    let mut chosen = Vec::new();
    for client in clients {
        for to in targets(lab, &manifest, 20) {
            for protocol in PROTOCOLS {
                let by = answers(client, to, protocol, 12)?;
                ensure!(by.len() == 1, "{} -> {to} {protocol:?}: {by:?}", client.name());
                chosen.push((client, to, protocol, by));
            }
        }
    }
    let different: BTreeSet<_> = chosen.iter().flat_map(|(.., by)| by).collect();
    ensure!(different.len() > 1, "everybody got {different:?}");

    // Also after a restart of the daemon.
    daemon.kill()?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    for (client, to, protocol, before) in &chosen {
        let now = answers(client, *to, *protocol, 2)?;
        ensure!(now == *before, "{} -> {to}: {now:?} after {before:?}", client.name());
    }

    // An endpoint that leaves is forgotten, and the others are not.
    let (gone, stays) = (HERE[0], [HERE[1], ELSEWHERE]);
    let leaving = FAMILIES.map(|family| lab.pods[0].address(family));
    manifest.endpoints.retain(|endpoint| !leaving.contains(&endpoint.address));
    manifest.write(&world.manifests)?;
    for (client, to, protocol, before) in &chosen {
        let moved = before.contains(gone);
        let kept = |now: &BTreeSet<String>| if moved { !now.contains(gone) } else { now == before };
        let settled = || answers(client, *to, *protocol, 3).is_ok_and(|now| kept(&now));
        ensure!(
            eventually(NOTICE, settled),
            "{} -> {to} {protocol:?} after {before:?}",
            client.name()
        );
        let now = answers(client, *to, *protocol, 6)?;
        ensure!(now.len() == 1 && now.iter().all(|by| stays.contains(&by.as_str())), "{now:?}");
    }

    // And nobody is kept when the Service does not ask for it any more.
    manifest.extra["spec"]["sessionAffinity"] = json!("None");
    manifest.write(&world.manifests)?;
    let to = targets(lab, &manifest, 20)[0];
    let spread = || answers(&lab.allowed, to, Protocol::Tcp, 40).is_ok_and(|by| by.len() == 2);
    ensure!(eventually(NOTICE, spread), "still kept");
    Ok(())
}

#[test]
fn clients_are_forgotten_in_time() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let manifest = exposed(
        20,
        lab,
        &json!({
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 1 } },
        }),
    );
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    let to = targets(lab, &manifest, 20)[0];
    let mut seen = BTreeSet::new();
    // Each time by chance one of two: thirty times the same one in a billion tries.
    let both = eventually(Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_millis(1200));
        seen.extend(answers(&lab.allowed, to, Protocol::Tcp, 1).unwrap_or_default());
        seen.len() == 2
    });
    ensure!(both, "always {seen:?}");
    Ok(())
}

#[test]
fn affinity_gives_way_to_the_policy_local() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let mut manifest = exposed(20, lab, &json!({ "sessionAffinity": "ClientIP" }));
    manifest.endpoints = Endpoint::elsewhere(lab).to_vec();
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    let to = targets(lab, &manifest, 20);
    for to in &to {
        let by = answers(&lab.allowed, *to, Protocol::Tcp, 2)?;
        ensure!(by == BTreeSet::from([ELSEWHERE.to_owned()]), "{to}: {by:?}");
    }
    manifest.endpoints.extend(lab.pods.iter().flat_map(Endpoint::of));
    manifest.extra["spec"]["externalTrafficPolicy"] = json!("Local");
    manifest.write(&world.manifests)?;
    for to in &to {
        let is_cluster_ip = manifest.cluster_ips.contains(&to.ip());
        let mut last = BTreeSet::new();
        let settled = eventually(NOTICE, || {
            last = answers(&lab.allowed, *to, Protocol::Tcp, 4).unwrap_or_default();
            // The ClusterIP is none of that policy's business, so the client keeps what it has.
            let here = last.iter().all(|name| HERE.contains(&name.as_str()));
            last.len() == 1 && here != is_cluster_ip
        });
        ensure!(settled, "{to}: {last:?}");
    }
    Ok(())
}

#[test]
fn the_hash_of_a_client_chooses() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let mut manifest = exposed(20, lab, &json!({}));
    manifest.extra["metadata"]["annotations"]["portcullis.dev/balancing"] = json!("source-hash");
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    for to in targets(lab, &manifest, 20) {
        for client in [&lab.allowed, &lab.refused, &lab.node] {
            let by = answers(client, to, Protocol::Tcp, 8)?;
            ensure!(by.len() == 1, "{} -> {to}: {by:?}", client.name());
        }
    }
    Ok(())
}

#[test]
fn a_canary_gets_its_share() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let mut manifest = exposed(20, lab, &json!({}));
    manifest.extra["metadata"]["annotations"]["portcullis.dev/balancing"] = json!("weighted");
    // Two slices: the old version and the new one.
    let mut list = manifest.list();
    let items = list["items"].as_array_mut().context("a list")?;
    let slices: Vec<_> = items.extract_if(1.., |_| true).collect();
    for (mut slice, (pod, weight)) in
        slices.iter().flat_map(|slice| [(slice.clone(), (0, "90")), (slice.clone(), (1, "10"))])
    {
        let only = slice["endpoints"][pod].clone();
        slice["endpoints"] = json!([only]);
        let name = slice["metadata"]["name"].as_str().context("a name")?;
        slice["metadata"]["name"] = json!(format!("{name}-{pod}"));
        slice["metadata"]["annotations"] = json!({ "portcullis.dev/weight": weight });
        items.push(slice);
    }
    let file = world.manifests.join("web-20.json");
    replace(&file, &list.to_string())?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    for to in targets(lab, &manifest, 20) {
        let tally = probe_many(&lab.allowed, to, Protocol::Udp, 200)?;
        distribution::assert_fits(&tally, &[(HERE[0], 9), (HERE[1], 1)]);
    }
    // The old version gets nothing new.
    replace(&file, &list.to_string().replace("\"90\"", "\"0\""))?;
    let to = targets(lab, &manifest, 20)[0];
    let only_new = || {
        let by = answers(&lab.allowed, to, Protocol::Tcp, 20).unwrap_or_default();
        by == BTreeSet::from([HERE[1].to_owned()])
    };
    ensure!(eventually(NOTICE, only_new), "the old version still gets connections");
    Ok(())
}
