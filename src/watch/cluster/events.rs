//! What is wrong with a Service on this node alone, as Kubernetes Events: `kubectl describe service`
//! shows them. What is wrong with the object itself is no Event, because every node finds it.

use k8s_openapi::api::core::v1 as core;
use kube::runtime::events::{Event, EventType, Recorder, Reporter as Source};
use kube::{Api, Client, Resource};
use tokio::sync::broadcast::error::RecvError;

use crate::report::{Local, Reporter};

/// Publishes what the reporter tells, for ever. Where this account may not, it is said once.
pub async fn publish(client: Client, node_name: &str, reporter: &Reporter) {
    let mut found = reporter.watch_local();
    let source =
        Source { controller: "portcullis".to_owned(), instance: Some(node_name.to_owned()) };
    let recorder = Recorder::new(client.clone(), source);
    let mut said = false;
    loop {
        let local = match found.recv().await {
            Ok(local) => local,
            Err(RecvError::Lagged(count)) => {
                tracing::warn!(count, "too much is wrong at once to publish it all as Events");
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        match publish_one(&client, &recorder, node_name, &local).await {
            Ok(()) => said = false,
            Err(error) if !said => {
                tracing::warn!(%error, "cannot publish Events about Services");
                said = true;
            }
            Err(_) => {}
        }
    }
}

async fn publish_one(
    client: &Client,
    recorder: &Recorder,
    node_name: &str,
    local: &Local,
) -> Result<(), kube::Error> {
    let Local { service, reason, diagnostic } = local;
    let services: Api<core::Service> = Api::namespaced(client.clone(), &service.namespace);
    // An Event names the very object, not only one of its name.
    let Some(object) = services.get_opt(&service.name).await? else { return Ok(()) };
    let mut note = format!("node {node_name}: {}: {}", diagnostic.field, diagnostic.message);
    note.truncate(note.floor_char_boundary(LONGEST_NOTE));
    let event = Event {
        type_: EventType::Warning,
        reason: (*reason).to_owned(),
        note: Some(note),
        action: "Serve".to_owned(),
        secondary: None,
    };
    recorder.publish(&event, &object.object_ref(&())).await
}

/// What the API server takes (`NoteLengthLimit`), in bytes.
const LONGEST_NOTE: usize = 1024;
