//! Connections over which the daemon answers HTTP.
//!
//! Health checks are asked for at the node's addresses, so whoever reaches the node can open
//! connections. They must neither use up the process' descriptors and memory nor keep anybody else
//! from getting an answer. So there are only so many, each has its time, and it serves one request;
//! where no place is left, the oldest goes. An honest client is done long before.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

/// How long a client may take to ask and to get its answer.
const LIMIT: Duration = Duration::from_secs(5);
/// What a request may take in memory, in bytes; probes ask with a few hundred.
const LARGEST: usize = 16 << 10;
/// How long to wait before more connections are taken, where the process can have no more.
const PAUSE: Duration = Duration::from_secs(1);

/// The connections of all servers of the daemon. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Connections {
    places: Arc<Semaphore>,
    /// Those that are open, the oldest first, and some that were.
    open: Arc<Mutex<VecDeque<AbortHandle>>>,
}

impl Default for Connections {
    fn default() -> Connections {
        Connections { places: Arc::new(Semaphore::new(Connections::MOST)), open: Arc::default() }
    }
}

impl Connections {
    /// How many there are at once.
    pub const MOST: usize = 256;

    /// Answers whoever connects to `listener`, for ever.
    pub async fn answer(&self, listener: &TcpListener, routes: &Router) -> Infallible {
        let mut said = false;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    said = false;
                    let place = self.place().await;
                    self.answer_one(stream, routes.clone(), place);
                }
                Err(error) if is_of_one(&error) => {}
                Err(error) => {
                    if !said {
                        tracing::warn!(%error, "cannot take connections; tried again");
                        said = true;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// A place for one more.
    async fn place(&self) -> OwnedSemaphorePermit {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return place;
        }
        self.end_oldest();
        // It is free when the task is gone.
        let place = Arc::clone(&self.places).acquire_owned().await;
        place.expect("the semaphore is never closed")
    }

    fn end_oldest(&self) {
        let mut open = self.open();
        while let Some(oldest) = open.pop_front() {
            if !oldest.is_finished() {
                return oldest.abort();
            }
        }
    }

    fn answer_one(&self, stream: TcpStream, routes: Router, place: OwnedSemaphorePermit) {
        let mut http = http1::Builder::new();
        http.keep_alive(false).max_buf_size(LARGEST);
        let answer = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
        let task = tokio::spawn(async move {
            let _place = place;
            // What goes wrong is the client's business.
            let _ = tokio::time::timeout(LIMIT, answer).await;
        });
        let mut open = self.open();
        open.retain(|connection| !connection.is_finished());
        open.push_back(task.abort_handle());
    }

    fn open(&self) -> MutexGuard<'_, VecDeque<AbortHandle>> {
        // Whoever panicked, the list is whole.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an error is about a connection that did not come about, and not about the next ones.
fn is_of_one(error: &io::Error) -> bool {
    [ErrorKind::ConnectionAborted, ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset]
        .contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Answers `yes` at an address of its own.
    async fn serve(connections: &Connections) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = connections.clone();
        let routes = Router::new().fallback(async || "yes");
        tokio::spawn(async move { connections.answer(&listener, &routes).await });
        address
    }

    async fn ask(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn idle_connections_keep_nobody_from_an_answer() {
        let connections = Connections::default();
        let (flooded, other) = (serve(&connections).await, serve(&connections).await);
        let mut idle = Vec::new();
        for _ in 0..Connections::MOST + 50 {
            let mut stream = TcpStream::connect(flooded).await.unwrap();
            stream.write_all(b"GET /").await.unwrap();
            idle.push(stream);
        }
        for address in [flooded, other] {
            let answer = ask(address).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("connection: close\r\n"), "{answer}");
            assert!(answer.ends_with("\r\n\r\nyes"), "{answer}");
        }
        // The first to come was the first to go.
        assert_eq!(idle[0].read(&mut [0]).await.unwrap_or(0), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_not_waited_for() {
        let connections = Connections::default();
        let address = serve(&connections).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(connections.places.available_permits(), Connections::MOST);
    }
}
