//! What is wrong with the objects: told once, in the log, and kept for whoever asks.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::commit::{Adoption, CommitError, Report};
use crate::model::{Diagnostic, NodeContext, ObjectKind, ObjectRef, ServiceName, Severity};
use crate::ruleset::Subject;

/// Hears what becomes of each object. Cheap to clone; all clones are one.
///
/// Each finding is logged when it appears or changes and once more when it is resolved, however
/// often it is reported in between.
#[derive(Clone, Debug)]
pub struct Reporter {
    node_name: Arc<str>,
    found: Arc<Mutex<BTreeMap<Origin, BTreeSet<Diagnostic>>>>,
    adoption: watch::Sender<Option<Adoption>>,
    node: watch::Sender<Option<Arc<NodeContext>>>,
    local: watch::Sender<()>,
}

/// Something that is wrong with a Service on this node alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Local {
    /// The Service.
    pub service: ServiceName,
    /// One word for it, in the style of Kubernetes' Events.
    pub reason: &'static str,
    /// What it is.
    pub diagnostic: Diagnostic,
}

/// Who says so: a later word of the same origin replaces an earlier one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    Commit(Subject),
    Conflict(ServiceName),
    HealthCheck(ServiceName),
    Node,
    Manifests,
}

impl Origin {
    /// The Service and a word for it, where it is about this node alone.
    fn local(&self) -> Option<(&ServiceName, &'static str)> {
        match self {
            Origin::Conflict(service) => Some((service, "NodePortInUse")),
            // As kube-proxy calls it.
            Origin::HealthCheck(service) => Some((service, "FailedToStartServiceHealthcheck")),
            Origin::Commit(_) | Origin::Node | Origin::Manifests => None,
        }
    }
}

impl Reporter {
    /// A reporter that has heard nothing yet, on the node of this name.
    pub fn new(node_name: Arc<str>) -> Reporter {
        let (node, _) = watch::channel(None);
        let (adoption, _) = watch::channel(None);
        let (local, _) = watch::channel(());
        Reporter { node_name, found: Arc::default(), adoption, node, local }
    }

    /// Takes that the kernel holds for the first time what it should.
    pub fn adopted(&self, adoption: Adoption, services: usize) {
        let Adoption { found, replaced, operations } = adoption;
        tracing::info!(services, found, replaced, operations, "the kernel holds what it should");
        // A source adopts once.
        self.adoption
            .send_if_modified(|first| first.is_none() && first.replace(adoption).is_none());
    }

    /// What the first commit did; `None` until it is done. From then on the node is served.
    pub fn adoption(&self) -> Option<Adoption> {
        *self.adoption.borrow()
    }

    /// Waits until the first commit is done.
    pub async fn wait_for_adoption(&self) {
        // This is a sender, so the channel is not closed.
        let _ = self.adoption.subscribe().wait_for(Option::is_some).await;
    }

    /// Takes what became of a subject when it was committed.
    pub fn commit(&self, report: &Report) {
        let Report { subject, refused, plan } = report;
        let diagnostics = plan.iter().flat_map(|plan| plan.diagnostics.iter().cloned());
        let mut found: BTreeSet<Diagnostic> = diagnostics.collect();
        found.extend(refused.as_ref().map(|error| self.refusal(subject, error)));
        self.replace(Origin::Commit(subject.clone()), found);
    }

    /// Takes what is wrong with the node and the `ServiceCIDR`s.
    pub fn node(&self, node: &NodeContext) {
        self.replace(Origin::Node, node.diagnostics().cloned().collect());
        self.node.send_replace(Some(Arc::new(node.clone())));
    }

    /// What is known of the node; `None` while nothing is.
    pub fn node_context(&self) -> Option<Arc<NodeContext>> {
        self.node.borrow().clone()
    }

    /// Tells when something else is known of the node.
    pub fn watch_node(&self) -> watch::Receiver<Option<Arc<NodeContext>>> {
        let mut node = self.node.subscribe();
        node.mark_changed();
        node
    }

    /// Takes what is wrong with a Service's health check on this node.
    pub fn health_check(&self, service: &ServiceName, problem: Option<Diagnostic>) {
        self.replace(Origin::HealthCheck(service.clone()), problem.into_iter().collect());
    }

    /// Takes which processes of this node listen on a Service's node ports.
    pub fn conflict(&self, service: &ServiceName, problems: Vec<Diagnostic>) {
        self.replace(Origin::Conflict(service.clone()), problems.into_iter().collect());
    }

    /// Everything that is wrong now with Services on this node alone.
    pub fn local(&self) -> BTreeSet<Local> {
        let found = self.found();
        let local = found.iter().filter_map(|(origin, found)| Some((origin.local()?, found)));
        local
            .flat_map(|((service, reason), found)| {
                let local = move |diagnostic: &Diagnostic| Local {
                    service: service.clone(),
                    reason,
                    diagnostic: diagnostic.clone(),
                };
                found.iter().map(local)
            })
            .collect()
    }

    /// Tells when [`Reporter::local`] may be different.
    pub fn watch_local(&self) -> watch::Receiver<()> {
        let mut local = self.local.subscribe();
        local.mark_changed();
        local
    }

    /// Takes everything that is wrong with manifest files.
    pub fn manifests(&self, diagnostics: Vec<Diagnostic>) {
        self.replace(Origin::Manifests, diagnostics.into_iter().collect());
    }

    /// Everything that is wrong now, sorted.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        let found = self.found();
        let all: BTreeSet<&Diagnostic> = found.values().flatten().collect();
        all.into_iter().cloned().collect()
    }

    fn replace(&self, origin: Origin, now: BTreeSet<Diagnostic>) {
        let mut found = self.found();
        let before = found.remove(&origin).unwrap_or_default();
        let (appeared, resolved) = news(&before, &now);
        let is_news = !appeared.is_empty() || !resolved.is_empty();
        let is_local = origin.local().is_some();
        appeared.into_iter().for_each(log_appeared);
        resolved.into_iter().for_each(log_resolved);
        if !now.is_empty() {
            found.insert(origin, now);
        }
        drop(found);
        if is_news && is_local {
            self.local.send_replace(());
        }
    }

    fn refusal(&self, subject: &Subject, error: &CommitError) -> Diagnostic {
        let object = match subject {
            Subject::Service(service) => ObjectRef::service(service),
            Subject::Node => ObjectRef {
                kind: ObjectKind::Node,
                namespace: "".into(),
                name: self.node_name.clone(),
            },
        };
        let mut message = format!("cannot be brought into the kernel: {error}");
        let mut source = error.source().and_then(Error::source);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        message.push_str("; tried again, and until then what was in force before stays so");
        Diagnostic { object, field: String::new(), severity: Severity::Error, message }
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<Origin, BTreeSet<Diagnostic>>> {
        // Whoever panicked, the map is whole: it is changed by single operations.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is there now and was not before, and what was there and is resolved: about a field of which
/// something else is said now, nothing is resolved.
fn news<'a>(
    before: &'a BTreeSet<Diagnostic>,
    now: &'a BTreeSet<Diagnostic>,
) -> (Vec<&'a Diagnostic>, Vec<&'a Diagnostic>) {
    let appeared: Vec<&Diagnostic> = now.difference(before).collect();
    let changed: BTreeSet<_> = appeared.iter().map(|d| (&d.object, &d.field)).collect();
    let gone = before.difference(now);
    let resolved = gone.filter(|d| !changed.contains(&(&d.object, &d.field))).collect();
    (appeared, resolved)
}

fn log_appeared(diagnostic: &Diagnostic) {
    let Diagnostic { object, field, severity, message: problem } = diagnostic;
    match severity {
        Severity::Error => {
            tracing::error!(%object, field, %severity, problem, "part of an object is not in force");
        }
        Severity::Warning => {
            tracing::warn!(%object, field, %severity, problem, "an object needs a look");
        }
    }
}

fn log_resolved(diagnostic: &Diagnostic) {
    let Diagnostic { object, field, severity, message: problem } = diagnostic;
    tracing::info!(%object, field, %severity, problem, "a problem of an object is resolved");
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    fn finding(field: &str, message: &str) -> Diagnostic {
        let (namespace, name) = ("shop".into(), "web".into());
        Diagnostic {
            object: ObjectRef { kind: ObjectKind::Service, namespace, name },
            field: field.to_owned(),
            severity: Severity::Warning,
            message: message.to_owned(),
        }
    }

    fn report(diagnostics: &[Diagnostic], refused: Option<CommitError>) -> Report {
        let subject = Subject::Service(ServiceName::new("shop", "web"));
        let service = crate::model::Service {
            diagnostics: diagnostics.to_vec(),
            ..crate::model::Service::new(ServiceName::new("shop", "web"))
        };
        let plan = crate::plan::plan_service(&service, [], &NodeContext::new("worker".into()));
        Report { subject, refused, plan: Some(Arc::new(plan)) }
    }

    /// What is logged while `f` runs: level, message, field and problem.
    fn logged(f: impl FnOnce()) -> Vec<String> {
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone());
        tracing::subscriber::with_default(subscriber.finish(), f);
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let line = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let field = |name: &str| line["fields"][name].as_str().unwrap().to_owned();
            assert_eq!(field("object"), "Service shop/web");
            let level = line["level"].as_str().unwrap();
            format!("{level} {}: {}: {}", field("message"), field("field"), field("problem"))
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn tells_each_finding_once() {
        let reporter = Reporter::new("worker".into());
        let (a1, a2, b) = (finding("a", "1"), finding("a", "2"), finding("b", "1"));
        for (now, expected) in [
            (vec![], vec![]),
            (vec![a1.clone()], vec!["WARN an object needs a look: a: 1"]),
            (vec![a1.clone()], vec![]),
            (vec![a1.clone(), b.clone()], vec!["WARN an object needs a look: b: 1"]),
            // About a field: changed, not resolved.
            (vec![a2.clone(), b.clone()], vec!["WARN an object needs a look: a: 2"]),
            (vec![b.clone()], vec!["INFO a problem of an object is resolved: a: 2"]),
            (vec![], vec!["INFO a problem of an object is resolved: b: 1"]),
            (vec![], vec![]),
        ] {
            let lines = logged(|| reporter.commit(&report(&now, None)));
            assert_eq!(lines, expected, "{now:?}");
            assert_eq!(reporter.diagnostics(), now);
        }
        assert!(reporter.found().is_empty());
    }

    #[test]
    fn a_refusal_is_a_finding_with_its_causes() {
        let reporter = Reporter::new("worker".into());
        let cause = io::Error::other("no buffer space");
        let refused = CommitError::Kernel(Arc::new(crate::netlink::Error::Send(cause)));
        let lines = logged(|| reporter.commit(&report(&[], Some(refused))));
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("ERROR part of an object is not in force: : cannot be"));
        assert!(lines[0].contains("no buffer space"), "{lines:?}");
        assert_eq!(reporter.diagnostics()[0].severity, Severity::Error);
        let lines = logged(|| reporter.commit(&report(&[], None)));
        assert!(lines[0].starts_with("INFO a problem of an object is resolved"), "{lines:?}");
        assert_eq!(reporter.diagnostics(), []);
    }

    #[test]
    fn keeps_the_first_adoption() {
        let reporter = Reporter::new("worker".into());
        assert_eq!(reporter.adoption(), None);
        let adoption = Adoption { found: true, replaced: false, operations: 7 };
        reporter.clone().adopted(adoption, 3);
        reporter.adopted(Adoption::default(), 0);
        assert_eq!(reporter.adoption(), Some(adoption));
    }

    #[test]
    fn origins_do_not_replace_each_other() {
        let reporter = Reporter::new("worker".into());
        let (a, b, c) = (finding("a", "1"), finding("b", "1"), finding("c", "1"));
        reporter.commit(&report(std::slice::from_ref(&b), None));
        reporter.manifests(vec![c.clone(), a.clone()]);
        let mut node = NodeContext::new("worker".into());
        node.node.diagnostics.push(a.clone());
        reporter.node(&node);
        assert_eq!(reporter.diagnostics(), [a.clone(), b.clone(), c]);
        reporter.clone().manifests(Vec::new());
        assert_eq!(reporter.diagnostics(), [a, b]);
    }
}
