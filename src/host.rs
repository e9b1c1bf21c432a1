//! What the machine itself tells of this node.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

/// The addresses of all interfaces.
///
/// # Errors
/// When they cannot be listed, for instance because the process can have no more descriptors.
pub fn own_addresses() -> io::Result<HashSet<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    Ok(addresses.collect())
}

/// The addresses of all interfaces, as they were when they could be listed last.
#[derive(Debug, Default)]
pub struct OwnAddresses {
    known: Option<HashSet<IpAddr>>,
    failed: bool,
}

impl OwnAddresses {
    /// Lists them anew. Where that fails, it gives what was known before, and says so once: a node
    /// does not lose its addresses because nobody can look.
    ///
    /// # Errors
    /// When nothing was known before.
    pub fn look(&mut self) -> io::Result<&HashSet<IpAddr>> {
        self.keep(own_addresses())
    }

    fn keep(&mut self, listed: io::Result<HashSet<IpAddr>>) -> io::Result<&HashSet<IpAddr>> {
        match listed {
            Ok(now) => {
                self.failed = false;
                Ok(self.known.insert(now))
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!(%error, "cannot list the node's addresses; tried again");
                }
                self.known.as_ref().ok_or(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_stays_where_nobody_can_look() {
        let error = || Err(io::Error::from_raw_os_error(nix::errno::Errno::EMFILE as i32));
        let addresses = |text: &str| HashSet::from([text.parse().unwrap()]);
        let mut own = OwnAddresses::default();
        assert!(own.keep(error()).is_err());
        assert_eq!(own.keep(Ok(addresses("192.0.2.1"))).unwrap(), &addresses("192.0.2.1"));
        assert_eq!(own.keep(error()).unwrap(), &addresses("192.0.2.1"));
        assert_eq!(own.keep(Ok(addresses("192.0.2.2"))).unwrap(), &addresses("192.0.2.2"));
        assert_eq!(own.keep(Ok(HashSet::new())).unwrap(), &HashSet::new());
    }

    #[test]
    fn loopback_is_there() {
        assert!(own_addresses().unwrap().iter().any(IpAddr::is_loopback));
    }
}
