//! Committing on the real kernel: adoption, blame, conflicts, surprises and group commit.

mod adoption;
mod blame;
mod group;
mod histories;
mod surprises;
mod tampering;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::commit::{Adoption, Change, CommitError, Report, Worker};
use portcullis::model::Protocol::Tcp;
use portcullis::netlink::{ChainDump, Data, Error, Socket, TableDump};
use portcullis::ruleset::{LOCAL_SLOTS, Subject, TABLE};
use portcullis_integration::lab::{Namespace, eventually};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::services::{Sketch, node, service};

/// Where node ports are served here.
const NODE_PORTS_AT: &[&str] = &["192.168.77.1/32", "fd00:77::1/128"];
const LIMIT: Duration = Duration::from_secs(10);

/// A machine, as a network namespace with nothing in it.
struct Machine {
    namespace: Namespace,
    /// Looks and never writes. It is there from the beginning, and so has the port number that the
    /// kernel prefers for this process: a socket that is closed by a process which another test is
    /// about to start gives its number free a moment before the kernel tells that it is gone, and
    /// who gets the same number then loses the table for it.
    observer: Mutex<Socket>,
}

/// A daemon's committing part, and what it reported.
struct Daemon {
    worker: Worker,
    reports: Arc<Mutex<Vec<Report>>>,
}

impl Machine {
    /// `None` where this machine cannot run the test.
    fn new() -> Result<Option<Machine>> {
        if !available(&[Requirement::Root, Requirement::Nft]) {
            return Ok(None);
        }
        Machine::named("machine").map(Some)
    }

    fn named(name: &str) -> Result<Machine> {
        let namespace = Namespace::new(name)?;
        let observer = Mutex::new(namespace.enter(Socket::open)?);
        Ok(Machine { namespace, observer })
    }

    /// Starts a daemon that has done nothing yet.
    fn daemon(&self) -> Result<Daemon> {
        self.start(|worker| worker)
    }

    /// [`Machine::daemon`] on a kernel without owners of tables.
    fn daemon_without_owner(&self) -> Result<Daemon> {
        self.start(Worker::without_owner)
    }

    fn start(&self, change: fn(Worker) -> Worker) -> Result<Daemon> {
        let reports = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&reports);
        let report = move |report| sink.lock().expect("no panic while reporting").push(report);
        let worker = self.namespace.enter(|| Worker::open(report))?;
        Ok(Daemon { worker: change(worker), reports })
    }

    /// Starts a daemon, which adopts what is there.
    fn adopted(&self, services: &[Sketch]) -> Result<(Daemon, Adoption)> {
        let mut daemon = self.daemon()?;
        let adoption = daemon.adopt(services)?;
        Ok((daemon, adoption))
    }

    /// Ends a daemon and waits until its table has no owner.
    fn end(&self, daemon: Daemon) -> Result<()> {
        drop(daemon);
        // A process that another test is about to start may hold the socket for a moment.
        let flags = || self.dump().map(|dump| dump.flags);
        ensure!(eventually(LIMIT, || flags().is_ok_and(|flags| !flags.is_owned())), "still owned");
        Ok(())
    }

    fn dump(&self) -> Result<TableDump> {
        self.observer().dump_table(TABLE)?.context("no table")
    }

    /// What the kernel holds, to be compared.
    fn state(&self) -> Result<State> {
        Ok(State::of(self.dump()?))
    }

    /// How many transactions there were in this namespace.
    fn generation(&self) -> Result<u32> {
        Ok(self.observer().generation()?)
    }

    fn observer(&self) -> MutexGuard<'_, Socket> {
        self.observer.lock().expect("no panic while looking")
    }

    fn nft(&self, script: &str) -> Result<String> {
        self.namespace.nft(script)
    }
}

impl Daemon {
    fn adopt(&mut self, services: &[Sketch]) -> Result<Adoption, CommitError> {
        let plans = services.iter().map(Sketch::plan).collect();
        self.worker.adopt(&node(NODE_PORTS_AT).expect("CIDRs"), plans)
    }

    /// Commits new versions of Services in one go; gives who was refused.
    fn commit(&mut self, services: &[Sketch]) -> BTreeMap<String, CommitError> {
        let change = |sketch: &Sketch| Change::Service(sketch.name(), Some(sketch.plan()));
        self.change(services.iter().map(change).collect())
    }

    fn delete(&mut self, service: &Sketch) -> BTreeMap<String, CommitError> {
        self.change(vec![Change::Service(service.name(), None)])
    }

    fn change(&mut self, changes: Vec<Change>) -> BTreeMap<String, CommitError> {
        let refused = self.worker.commit(changes).into_iter();
        refused.map(|(subject, error)| (subject.to_string(), error)).collect()
    }

    /// The last report about a Service.
    fn last_report(&self, service: &Sketch) -> Result<Report> {
        let reports = self.reports.lock().expect("no panic while reporting");
        let subject = Subject::Service(service.name());
        let last = reports.iter().rev().find(|report| report.subject == subject);
        last.cloned().with_context(|| format!("no report about {subject}"))
    }
}

/// What the kernel holds of the table, without what differs between equal worlds: the order of
/// elements, the table's owner, and which slot an endpoint has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    comment: Option<String>,
    chains: BTreeMap<String, ChainDump>,
    sets: BTreeMap<String, BTreeSet<Element>>,
}

/// Key, end of the interval, data, comment.
type Element = (Vec<u8>, Option<Vec<u8>>, Option<Data>, Option<String>);

impl State {
    fn of(dump: TableDump) -> State {
        let set = |(name, set): (String, portcullis::netlink::SetDump)| {
            let elements = set.elements.into_iter().map(|mut element| {
                if name.contains("endpoints") && !name.starts_with("no-") {
                    let slot = element.key.split_off(element.key.len() - 4);
                    let slot = u32::from_ne_bytes(slot.try_into().expect("four bytes"));
                    // Which of the lists of its frontend it is in.
                    element.key.extend((slot & LOCAL_SLOTS).to_ne_bytes());
                }
                (element.key, element.end, element.data, element.comment)
            });
            let elements: BTreeSet<_> = elements.collect();
            (name, elements)
        };
        State {
            comment: dump.comment,
            chains: dump.chains,
            sets: dump.sets.into_iter().map(set).collect(),
        }
    }

    /// Fails, naming the objects that differ.
    fn expect(&self, expected: &State) -> Result<()> {
        if self == expected {
            return Ok(());
        }
        let mut differences = Vec::new();
        let chains = self.chains.keys().chain(expected.chains.keys()).collect::<BTreeSet<_>>();
        for name in chains {
            let (is, should) = (self.chains.get(name), expected.chains.get(name));
            if is != should {
                differences.push(format!("chain {name}: {is:?}, not {should:?}"));
            }
        }
        let sets = self.sets.keys().chain(expected.sets.keys()).collect::<BTreeSet<_>>();
        for name in sets {
            let (is, should) = (self.sets.get(name), expected.sets.get(name));
            if is != should {
                differences.push(format!("set {name}: {is:?}, not {should:?}"));
            }
        }
        anyhow::bail!("the kernel holds something else:\n{}", differences.join("\n"))
    }
}

/// What a fresh machine holds of these Services.
fn fresh(services: &[Sketch]) -> Result<State> {
    let machine = Machine::named("fresh")?;
    let (daemon, _) = machine.adopted(services)?;
    ensure!(!daemon.worker.has_refused(), "{:?}", daemon.worker);
    machine.state()
}

/// A Service number `number` with a node port and the endpoints 10.244.0.N of `endpoints`.
fn web(number: u8, endpoints: &[u8]) -> Sketch {
    let addresses: Vec<String> = endpoints.iter().map(|n| format!("10.244.0.{n}")).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    service(&format!("shop/web-{number}"))
        .at(&format!("10.96.0.{number}"))
        .port("http", Tcp, 80, 30000 + u16::from(number))
        .local(&addresses)
}

/// [`web`] with a name that makes the chain of its firewall too long for the kernel (255 bytes).
/// Without a firewall the kernel takes it.
fn too_long(number: u8) -> Sketch {
    let name = format!("shop/{}-{number}", "x".repeat(260));
    service(&name)
        .at(&format!("10.96.1.{number}"))
        .port("http", Tcp, 80, 31000 + u16::from(number))
        .to(&["10.244.1.1"])
}

/// The error code of a refusal.
fn errno(error: &CommitError) -> Option<i32> {
    let CommitError::Kernel(error) = error else { return None };
    let Error::Refused(refusals) = &**error else { return None };
    refusals.first()?.error.raw_os_error()
}
