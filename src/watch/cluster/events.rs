//! What is wrong with a Service on this node alone, as Kubernetes Events: `kubectl describe service`
//! shows them. What is wrong with the object itself is no Event, because every node finds it.

use std::collections::BTreeSet;
use std::time::Duration;

use backon::BackoffBuilder;
use k8s_openapi::Resource;
use k8s_openapi::api::core::v1 as core;
use kube::runtime::events::{Event, EventType, Recorder, Reporter as Source};
use kube::{Api, Client};

use crate::report::{Local, Reporter};

/// Publishes what the reporter finds, for ever: each finding once, as long as it is true. What
/// cannot be published is tried again; why it cannot is said once.
pub async fn publish(client: Client, node_name: &str, reporter: &Reporter) {
    let source =
        Source { controller: "portcullis".to_owned(), instance: Some(node_name.to_owned()) };
    let recorder = Recorder::new(client.clone(), source);
    let mut published: BTreeSet<Local> = BTreeSet::new();
    let mut changed = reporter.watch_local();
    let mut pauses = None;
    loop {
        match pauses.as_mut().and_then(Iterator::next) {
            Some(pause) => tokio::time::sleep(pause).await,
            None if changed.changed().await.is_err() => return,
            None => {}
        }
        changed.mark_unchanged();
        let found = reporter.local();
        published.retain(|local| found.contains(local));
        let mut failed = None;
        for local in found {
            if published.contains(&local) {
                continue;
            }
            match publish_one(&client, &recorder, node_name, &local).await {
                Ok(()) => drop(published.insert(local)),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        match failed {
            Some(error) if pauses.is_none() => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot publish Events about Services; tried again");
                pauses = Some(PAUSES.build());
            }
            Some(_) => {}
            None => pauses = None,
        }
    }
}

/// How long to wait before it is tried again: there may be many nodes, and no hurry.
const PAUSES: backon::ExponentialBuilder = backon::ExponentialBuilder::new()
    .with_jitter()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(60))
    .without_max_times();

async fn publish_one(
    client: &Client,
    recorder: &Recorder,
    node_name: &str,
    local: &Local,
) -> Result<(), kube::Error> {
    let Local { service, reason, diagnostic } = local;
    let services: Api<core::Service> = Api::namespaced(client.clone(), &service.namespace);
    // An Event names the very object, not only one of its name. Nothing else of it must be readable.
    let Some(object) = services.get_metadata_opt(&service.name).await? else { return Ok(()) };
    let about = core::ObjectReference {
        api_version: Some(core::Service::API_VERSION.to_owned()),
        kind: Some(core::Service::KIND.to_owned()),
        namespace: Some(service.namespace.to_string()),
        name: Some(service.name.to_string()),
        uid: object.metadata.uid,
        ..core::ObjectReference::default()
    };
    let mut note = format!("node {node_name}: {}: {}", diagnostic.field, diagnostic.message);
    note.truncate(note.floor_char_boundary(LONGEST_NOTE));
    let event = Event {
        type_: EventType::Warning,
        reason: (*reason).to_owned(),
        note: Some(note),
        action: "Serve".to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &about).await
}

/// What the API server takes (`NoteLengthLimit`), in bytes.
const LONGEST_NOTE: usize = 1024;
