//! Sampled refusals of the NodePort firewall, as structured log lines.
//!
//! The rules copy a sample of what they drop to an nflog group (see [`crate::ruleset`]); unlike
//! lines in the kernel log these arrive in every network namespace, and name the Service.

use crate::netlink::{Error, Listener, LoggedPacket};

/// Logs refused connections on a thread of its own until the process ends.
///
/// Where the group cannot be had, because another process listens to it, a warning says so, and
/// counting and dropping go on as ever.
pub fn log_in_background(group: u16) {
    let thread = std::thread::Builder::new().name("refused".to_owned());
    let started = thread.spawn(move || {
        if let Err(error) = log(group) {
            tracing::warn!(
                group,
                error = &error as &dyn std::error::Error,
                "refused connections are counted but not logged: the nflog group cannot be had",
            );
        }
    });
    if let Err(error) = started {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot start a thread");
    }
}

fn log(group: u16) -> Result<(), Error> {
    let listener = Listener::open(group)?;
    loop {
        for packet in listener.wait()? {
            log_packet(&packet);
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
