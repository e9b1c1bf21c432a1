//! The measurements of this project's own code: from Services and slices in memory to the end of
//! the kernel's transaction.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use portcullis::commit::{Change, Totals, Worker};
use portcullis::model::{Family, SourceRestriction};

use crate::cluster::{Cluster, NODE_PORTS};
use crate::isolation;
use crate::machine::peak_kib;
use crate::measure::{Job, Measurement, Outcome, Proxy, What};
use crate::objects;

/// How long the kernel may take to grow its hash tables in the background.
const SETTLE: Duration = Duration::from_millis(300);

/// Does a job.
///
/// # Errors
/// When the kernel refuses something, or an operation count is not what it should be.
pub fn run(job: &Job) -> Result<Vec<Measurement>> {
    let outcome = match job.what {
        What::ColdLoad => cold_load(job)?,
        What::Restart => restart(job)?,
        What::EndpointReplaced
        | What::EndpointCount
        | What::EndpointCountAlone
        | What::ServiceAdded
        | What::ServiceRemoved
        | What::CidrAdded => changes(job)?,
        What::Listing => bail!("nothing is listed"),
    };
    Ok(vec![Measurement { proxy: Proxy::Portcullis, what: job.what, size: job.size, outcome }])
}

fn cold_load(job: &Job) -> Result<Outcome> {
    let cluster = Cluster::new(job.size);
    let mut subject = Measured::open()?;
    let mut outcome = Outcome::default();
    subject.adopt(&cluster, &mut outcome)?;
    outcome.peak_kib.push(peak_kib("self")?);
    outcome.objects = Some(objects::count()?);
    Ok(outcome)
}

fn restart(job: &Job) -> Result<Outcome> {
    // The process before this one; its table outlives it.
    isolation::run_here(Job { what: What::ColdLoad, ..*job })?;
    std::thread::sleep(SETTLE);
    let cluster = Cluster::new(job.size);
    let mut outcome = Outcome::default();
    Measured::open()?.adopt(&cluster, &mut outcome)?;
    outcome.peak_kib.push(peak_kib("self")?);
    expect(job, &outcome, 0..=0)?;
    Ok(outcome)
}

fn changes(job: &Job) -> Result<Outcome> {
    let mut cluster = Cluster::new(job.size);
    if job.what == What::EndpointCount {
        for slice in &mut cluster.slices[..job.size.unchanged()] {
            slice.endpoints.pop();
        }
    }
    let mut subject = Measured::open()?;
    subject.adopt(&cluster, &mut Outcome::default())?;

    let mut outcome = Outcome::default();
    let among = if job.what == What::CidrAdded { NODE_PORTS } else { usize::MAX };
    for turn in 0..job.changes {
        let index = cluster.chosen(turn, among);
        change(job, index, &mut cluster, &mut subject, &mut outcome)?;
    }
    Ok(outcome)
}

fn change(
    job: &Job,
    index: usize,
    cluster: &mut Cluster,
    subject: &mut Measured,
    outcome: &mut Outcome,
) -> Result<()> {
    let frontends = cluster.frontends(index);
    // An endpoint on this node has an element of its own, for connections to itself; and where the
    // policy is `Local`, one in a second list of each frontend.
    let here = usize::from(cluster.is_local(index));
    let listed_here = here * cluster.local_frontends(index);
    // With session affinity it is said once more who serves where.
    let is_sticky = cluster.services[index].session_affinity.is_some();
    let sticky = if is_sticky { frontends } else { 0 };
    // Deleting and adding are one operation each.
    match job.what {
        What::EndpointReplaced => {
            cluster.replace_endpoint(index);
            subject.put(cluster, index, outcome)?;
            let come = usize::from(cluster.is_local(index));
            let operations = 2 * (frontends + sticky) + 2 * listed_here + here + come;
            expect(job, outcome, operations..=operations)
        }
        What::EndpointCount | What::EndpointCountAlone => {
            // With a Service's number of endpoints come and go its balancing chains, if nobody
            // else has as many: a chain and its rule for each kind of frontend. Those of so few
            // endpoints are always there for ClusterIPs.
            let chains = match job.what {
                What::EndpointCountAlone => frontends - cluster.services[index].cluster_ips.len(),
                _ => 0,
            };
            // If it was the only one here: the list of those here is led to another chain, and
            // connections that find it empty are dropped.
            let alone_here = 4 * listed_here;
            let always = here + alone_here + sticky;
            let (less, more) = (2 * chains + always, chains + always);
            let slices = &mut cluster.slices[index].endpoints;
            let mut gone: VecDeque<_> = slices.drain(..1).collect();
            subject.put(cluster, index, outcome)?;
            // The last endpoint goes, or moves into the gap; and the address changes its chain.
            expect(job, outcome, 3 * frontends + less..=5 * frontends + less)?;
            cluster.slices[index].endpoints.extend(gone.pop_front());
            subject.put(cluster, index, outcome)?;
            expect(job, outcome, 3 * frontends + more..=3 * frontends + more)
        }
        What::ServiceAdded | What::ServiceRemoved => {
            let added = cluster.push(index);
            let operations = elements_of(cluster, added);
            let mut apart = Outcome::default();
            let (on_add, on_remove) = match job.what {
                What::ServiceAdded => (&mut *outcome, &mut apart),
                _ => (&mut apart, &mut *outcome),
            };
            subject.put(cluster, added, on_add)?;
            expect(job, on_add, operations..=operations)?;
            let name = cluster.pop();
            subject.commit(on_remove, || Change::Service(name, None))?;
            expect(job, on_remove, operations..=operations)
        }
        What::CidrAdded => {
            cluster.add_cidr(index);
            subject.put(cluster, index, outcome)?;
            expect(job, outcome, 1..=1)
        }
        What::ColdLoad | What::Restart | What::Listing => unreachable!("no change"),
    }
}

/// How many elements a Service is.
fn elements_of(cluster: &Cluster, index: usize) -> usize {
    let (frontends, local) = (cluster.frontends(index), cluster.local_frontends(index));
    let (endpoints, here) =
        (cluster.slices[index].endpoints.len(), usize::from(cluster.is_local(index)));
    let service = &cluster.services[index];
    // The ClusterIP; each frontend with its endpoints; endpoints here.
    let mut elements = 1 + frontends * (1 + endpoints) + here;
    // With the policy `Local`: where pods of this node go, and endpoints here or that there is none.
    elements += local * (1 + here.max(1));
    if service.session_affinity.is_some() {
        elements += frontends * (1 + endpoints);
    }
    if let SourceRestriction::Allow(ranges) = &service.load_balancer_sources {
        let ranges = ranges.of_family(Family::V4).len();
        elements += service.load_balancer_ips.len() * service.ports.len() * (1 + ranges);
    }
    elements
}

/// Performance without a clock: a change must cost what changed.
fn expect(job: &Job, outcome: &Outcome, operations: RangeInclusive<usize>) -> Result<()> {
    let got = outcome.operations.last().copied().unwrap_or_default();
    ensure!(operations.contains(&got), "{job:?} took {got} operations, not {operations:?}");
    Ok(())
}

/// A worker whose transactions are timed.
struct Measured {
    worker: Worker,
    refusals: Arc<Mutex<Vec<String>>>,
}

impl Measured {
    fn open() -> Result<Measured> {
        let refusals = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&refusals);
        let worker = Worker::open(move |report| {
            if let Some(error) = report.refused {
                let refusal = format!("{}: {error}", report.subject);
                heard.lock().expect("nobody panics with it").push(refusal);
            }
        })?;
        Ok(Measured { worker, refusals })
    }

    /// Plans everything and commits it as the first transaction.
    fn adopt(&mut self, cluster: &Cluster, outcome: &mut Outcome) -> Result<()> {
        let before = self.worker.totals();
        let node = cluster.node.clone();
        let begun = Instant::now();
        let plans = cluster.plans();
        let planned = begun.elapsed();
        let adoption = self.worker.adopt(&node, plans)?;
        outcome.add(begun.elapsed());
        outcome.plan_seconds.push(planned.as_secs_f64());
        self.note(before, outcome)?;
        // Taking over the ownership of the table is no write.
        *outcome.operations.last_mut().expect("just noted") = adoption.operations;
        Ok(())
    }

    /// Plans and commits one Service.
    fn put(&mut self, cluster: &Cluster, index: usize, outcome: &mut Outcome) -> Result<()> {
        self.commit(outcome, || {
            Change::Service(cluster.services[index].name.clone(), Some(cluster.plan(index)))
        })
    }

    fn commit(&mut self, outcome: &mut Outcome, change: impl FnOnce() -> Change) -> Result<()> {
        let before = self.worker.totals();
        let begun = Instant::now();
        let change = change();
        self.worker.commit(vec![change]);
        outcome.add(begun.elapsed());
        self.note(before, outcome)
    }

    fn note(&mut self, before: Totals, outcome: &mut Outcome) -> Result<()> {
        let after = self.worker.totals();
        outcome
            .kernel_seconds
            .push(after.kernel_time.saturating_sub(before.kernel_time).as_secs_f64());
        outcome.operations.push(after.operations - before.operations);
        outcome.bytes.push(after.bytes - before.bytes);
        let refusals = self.refusals.lock().expect("nobody panics with it");
        ensure!(refusals.is_empty(), "the kernel refused {}", refusals.join("; "));
        Ok(())
    }
}
