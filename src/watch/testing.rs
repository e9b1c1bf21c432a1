//! For tests: a kernel of one's own, and what it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::commit::Worker;
use crate::netlink::{self, Data, Socket, TableDump};
use crate::report::Reporter;
use crate::ruleset::TABLE;

/// How long a test waits for what must happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(50);

/// A network namespace of one's own, which nobody else sees and which goes with its last socket.
pub(super) struct Kernel(Socket);

impl Kernel {
    /// A new namespace and a worker in it, which tells `reporter`; `None`, said on stderr, where
    /// this process may not make one.
    pub(super) fn new(reporter: &Reporter) -> Option<(Kernel, Worker)> {
        let reporter = reporter.clone();
        let opened = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).ok()?;
            let worker = Worker::open(move |report| reporter.commit(&report)).expect("nf_tables");
            Some((Kernel(Socket::open().expect("a socket")), worker))
        });
        let opened = opened.join().expect("no panic");
        if opened.is_none() {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "this test needs root");
            eprintln!("skipped: no right to make a network namespace");
        }
        opened
    }

    /// Each Service with its IPv4 ClusterIP and the addresses of its endpoints, as
    /// `default/web 10.96.0.7: 10.0.0.1 10.0.0.2`. Sorted.
    pub(super) fn services(&mut self) -> Vec<String> {
        let Some(table) = self.table() else { return Vec::new() };
        let mut endpoints: BTreeMap<Ipv4Addr, BTreeSet<Ipv4Addr>> = BTreeMap::new();
        for element in &table.sets["endpoints4"].elements {
            let Some(Data::Value(value)) = &element.data else { panic!("{element:?}") };
            endpoints.entry(address(&element.key)).or_default().insert(address(value));
        }
        let services = table.sets["cluster-ips4"].elements.iter().map(|element| {
            let (owner, ip) = (element.comment.as_deref().unwrap_or("?"), address(&element.key));
            let backends = endpoints.get(&ip).into_iter().flatten();
            let start = format!("{owner} {ip}:");
            backends.fold(start, |text, backend| format!("{text} {backend}"))
        });
        services.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// At which IPv4 addresses node ports are served. Sorted.
    pub(super) fn node_port_addresses(&mut self) -> Vec<String> {
        let Some(table) = self.table() else { return Vec::new() };
        let elements = &table.sets["nodeport-ips4"].elements;
        elements.iter().map(|element| address(&element.key).to_string()).collect()
    }

    /// Where the addresses of no Service are dropped over IPv4. Sorted.
    pub(super) fn service_networks(&mut self) -> Vec<String> {
        let Some(table) = self.table() else { return Vec::new() };
        let elements = table.sets["service-cidrs4"].elements.iter();
        elements.map(|element| address(&element.key).to_string()).collect()
    }

    fn table(&mut self) -> Option<TableDump> {
        loop {
            match self.0.dump_table(TABLE) {
                Ok(table) => return table,
                // It changes all the time while a test writes; every test ends.
                Err(netlink::Error::Interrupted) => {}
                Err(error) => panic!("no listing: {error:?}"),
            }
        }
    }
}

fn address(bytes: &[u8]) -> Ipv4Addr {
    let bytes: [u8; 4] = bytes[..4].try_into().expect("four bytes");
    bytes.into()
}

/// Waits until `reached` gives what is expected.
pub(super) async fn until<T: PartialEq + std::fmt::Debug>(
    what: &str,
    expected: T,
    mut reached: impl FnMut() -> T,
) {
    let mut last = reached();
    let reach = async {
        while last != expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
            last = reached();
        }
    };
    let reached = tokio::time::timeout(PATIENCE, reach).await;
    assert!(reached.is_ok(), "{what}: {last:?} instead of {expected:?}");
}
