//! Connections through the ruleset.

use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portcullis_integration::lab::{Host, Lab};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::cluster::{Cluster, ENDPOINT_PORT, PORT, cluster_ip};
use crate::markdown::as_f64;
use crate::outcome::{Connections, Distribution};

/// How many connections are timed, one after the other ...
const TIMED: usize = 2_000;
/// ... after some that are not.
const WARM_UP: usize = 100;
/// Clients at once when connections are counted, and for how long.
const CLIENTS: usize = 2;
const COUNTED: Duration = Duration::from_secs(3);
/// How long one connection may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How often a server looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Servers in pods that accept connections and close them. Dropping it ends them.
pub struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    /// Starts a server in each pod.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn start(pods: &[Host]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for pod in pods {
            let address = SocketAddr::from((pod.v4, ENDPOINT_PORT));
            let socket = pod.enter(|| listen(address)).context("start a server")?;
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Fails when the time is over, or when the client was gone first.
                    let _ = socket.accept();
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn listen(address: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    // Holds for accept, too.
    socket.set_read_timeout(Some(TICK))?;
    Ok(socket)
}

/// Times and counts connections of the laboratory's last pod to the Service in the middle.
///
/// # Errors
/// When a connection fails.
pub fn measure(cluster: Cluster, lab: &Lab) -> Result<Connections> {
    let client = lab.pods.last().context("no pod for the client")?;
    let [middle, last] = cluster.probed().map(|service| to(cluster_ip(service)));
    client.enter(|| connect(&last)).context("connect to the last Service")?;
    let connect_times = client.enter(|| -> Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(TIMED);
        for number in 0..WARM_UP + TIMED {
            let took = connect(&middle).context("connect to the Service in the middle")?;
            if number >= WARM_UP {
                seconds.push(took.as_secs_f64());
            }
        }
        Ok(seconds)
    })?;
    let per_second = client.enter(|| {
        let began = Instant::now();
        let count = || -> Result<usize> {
            let mut count = 0;
            while began.elapsed() < COUNTED {
                connect(&middle)?;
                count += 1;
            }
            Ok(count)
        };
        // Threads inherit the namespace.
        thread::scope(|scope| -> Result<f64> {
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(count)).collect();
            let mut all = 0;
            for client in clients {
                all += client.join().expect("connecting does not panic")?;
            }
            Ok(as_f64(all) / began.elapsed().as_secs_f64())
        })
    })?;
    ensure!(per_second > 0.0, "no connection within {COUNTED:?}");
    Ok(Connections { connect: Distribution::of(connect_times), per_second })
}

/// Opens a connection and resets it; gives how long opening took.
fn connect(to: &SockAddr) -> Result<Duration> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // Leaves no port waiting behind, of which there are 28,000.
    socket.set_linger(Some(Duration::ZERO))?;
    let began = Instant::now();
    socket.connect_timeout(to, LIMIT)?;
    Ok(began.elapsed())
}

fn to(address: std::net::Ipv4Addr) -> SockAddr {
    SocketAddrV4::new(address, PORT).into()
}
