//! Sampled refusals of the NodePort firewall, as structured log lines.
//!
//! The rules copy a sample of what they drop to an nflog group (see [`crate::ruleset`]); unlike
//! lines in the kernel log these arrive in every network namespace, and name the Service.

use std::time::Duration;

use crate::netlink::{Error, Listener, LoggedPacket};

/// Logs refused connections on a thread of its own until the process ends.
///
/// Where the group cannot be had, because another process listens to it, a warning says so, and
/// counting and dropping go on as ever. It is tried again every minute.
pub fn log_in_background(group: u16) {
    let thread = std::thread::Builder::new().name("refused".to_owned());
    let started = thread.spawn(move || {
        let mut state = State::Unknown;
        loop {
            let error = match Listener::open(group) {
                Ok(listener) => {
                    state = state.next(State::Logging, group, None);
                    log(&listener)
                }
                Err(error) => error,
            };
            state = state.next(State::Failing, group, Some(&error));
            std::thread::sleep(PAUSE);
        }
    });
    if let Err(error) = started {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot start a thread");
    }
}

/// How long a failed listener waits before it tries again.
const PAUSE: Duration = Duration::from_secs(60);

/// Whether refused connections are logged, as far as it was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Logging,
    Failing,
}

impl State {
    /// Says what is new about it.
    fn next(self, new: State, group: u16, error: Option<&Error>) -> State {
        let error = error.map(|error| error as &dyn std::error::Error);
        match (self, new) {
            (State::Failing, State::Logging) => {
                tracing::info!(group, "refused connections are logged again");
            }
            (State::Unknown, State::Failing) => tracing::warn!(
                group,
                error,
                "refused connections are counted but not logged: the nflog group cannot be had",
            ),
            (State::Logging, State::Failing) => tracing::warn!(
                group,
                error,
                "refused connections are counted but not logged: the nflog group was lost",
            ),
            _ => {}
        }
        new
    }
}

/// Logs until the socket fails.
fn log(listener: &Listener) -> Error {
    loop {
        match listener.wait() {
            Ok(packets) => packets.iter().for_each(log_packet),
            Err(error) => return error,
        }
    }
}

fn log_packet(packet: &LoggedPacket) {
    let protocol = match packet.protocol {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "other",
    };
    tracing::info!(
        service = packet.prefix,
        source = %packet.source,
        source_port = packet.source_port,
        destination = %packet.destination,
        node_port = packet.destination_port,
        protocol,
        "refused a connection to a node port",
    );
}
