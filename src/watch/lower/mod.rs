//! Kubernetes objects in, the model out.
//!
//! Lowering never fails: what of an object cannot be understood is left out (or closed, where
//! leaving it out would open something), a [`Diagnostic`] says so, and the rest goes on. It is a
//! pure function of the object. `None` stands for an object that is none of this proxy's business.
//!
//! The API server has validated what it hands out; a manifest nobody has. The same rules hold for
//! both, so every one of them is written for an object that nobody has looked at before.

mod node;
mod service;
mod service_cidr;
mod slice;

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::model::{Diagnostic, ObjectKind, ObjectRef, Protocol, Severity};

pub(crate) use node::no_primary_addresses;
pub use node::node;
pub(crate) use service::OTHER_PROXY_LABEL;
pub use service::{Relevance, SOURCES_ANNOTATION, relevance, service, service_name};
pub use service_cidr::{service_cidr, service_cidr_name};
pub(crate) use slice::{HEADLESS_LABEL, slice_owner};
pub use slice::{slice, slice_name};

/// Collects what is wrong with one object.
struct Findings {
    object: ObjectRef,
    diagnostics: Vec<Diagnostic>,
}

impl Findings {
    fn of(kind: ObjectKind, metadata: &ObjectMeta) -> Findings {
        let namespace = match kind {
            ObjectKind::Node | ObjectKind::ServiceCidr => Arc::from(""),
            _ => namespace(metadata),
        };
        let object = ObjectRef { kind, namespace, name: name(metadata) };
        Findings { object, diagnostics: Vec::new() }
    }

    /// A part of the object is not in force.
    fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Error, field.into(), message.into());
    }

    /// All of it is in force, though maybe not as its author thinks.
    fn warning(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Warning, field.into(), message.into());
    }

    fn add(&mut self, severity: Severity, field: String, message: String) {
        let object = self.object.clone();
        self.diagnostics.push(Diagnostic { object, field, severity, message });
    }
}

fn name(metadata: &ObjectMeta) -> Arc<str> {
    metadata.name.as_deref().unwrap_or_default().into()
}

/// The namespace; an object without one stands in `default`, as kubectl has it.
fn namespace(metadata: &ObjectMeta) -> Arc<str> {
    match metadata.namespace.as_deref() {
        None | Some("") => "default".into(),
        Some(namespace) => namespace.into(),
    }
}

/// A port of an object as it is written.
struct WrittenPort<'a> {
    number: i32,
    protocol: Option<&'a str>,
    name: Option<&'a str>,
}

/// Number, protocol and name of a port; `None` if one of them is not valid, which is said of its
/// field.
fn valid_port<'a>(
    written: &WrittenPort<'a>,
    field: impl Fn(&str) -> String,
    findings: &mut Findings,
) -> Option<(NonZeroU16, Protocol, &'a str)> {
    let Some(number) = port(written.number) else {
        let message = format!("{} is not a port; the port is left out", written.number);
        findings.error(field("port"), message);
        return None;
    };
    let Some(protocol) = protocol(written.protocol) else {
        let other = shown(written.protocol.unwrap_or_default());
        let message = format!("{other} is none of TCP, UDP and SCTP; the port is left out");
        findings.error(field("protocol"), message);
        return None;
    };
    let name = written.name.unwrap_or_default();
    if !is_port_name(name) {
        let message = format!("{} is not a port name; the port is left out", shown(name));
        findings.error(field("name"), message);
        return None;
    }
    Some((number, protocol, name))
}

/// A port that is not zero and fits.
fn port(number: i32) -> Option<NonZeroU16> {
    u16::try_from(number).ok().and_then(NonZeroU16::new)
}

/// The protocol; TCP where the object names none.
fn protocol(name: Option<&str>) -> Option<Protocol> {
    name.map_or(Some(Protocol::Tcp), Protocol::parse)
}

/// Whether ports can be called so: what the API server allows (an IANA service name, RFC 6335, or
/// a DNS label) and upper case. Names stand in comments of the ruleset, so they must be bounded and
/// free of quotes.
fn is_port_name(name: &str) -> bool {
    name.len() <= 63
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// Parses an address that packets can be sent to.
///
/// # Errors
/// What is wrong with it, to follow the address in a sentence.
fn unicast(text: &str) -> Result<IpAddr, &'static str> {
    let address: IpAddr = text.parse().map_err(|_| "is not an IP address")?;
    match address {
        _ if address.is_unspecified() => Err("is the unspecified address"),
        _ if address.is_loopback() => Err("is a loopback address"),
        _ if address.is_multicast() => Err("is a multicast address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Err("is the broadcast address"),
        // The kernel never sees such a packet as IPv6.
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err("is an IPv4-mapped IPv6 address"),
        _ => Ok(address),
    }
}

/// What a message shows of a value that somebody wrote: bounded.
fn shown(text: &str) -> String {
    const LONGEST: usize = 64;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unicast_addresses() {
        for (text, expected) in [
            ("10.0.0.1", Ok(())),
            ("169.254.20.10", Ok(())),
            ("2001:db8::1", Ok(())),
            ("fe80::1", Ok(())),
            ("", Err("is not an IP address")),
            ("10.0.0.1/32", Err("is not an IP address")),
            ("010.0.0.1", Err("is not an IP address")),
            ("fe80::1%eth0", Err("is not an IP address")),
            ("None", Err("is not an IP address")),
            ("0.0.0.0", Err("is the unspecified address")),
            ("::", Err("is the unspecified address")),
            ("127.0.0.53", Err("is a loopback address")),
            ("::1", Err("is a loopback address")),
            ("224.0.0.1", Err("is a multicast address")),
            ("ff02::1", Err("is a multicast address")),
            ("255.255.255.255", Err("is the broadcast address")),
            ("::ffff:10.0.0.1", Err("is an IPv4-mapped IPv6 address")),
        ] {
            assert_eq!(unicast(text).map(drop), expected, "{text:?}");
        }
    }

    #[test]
    fn shown_values_are_bounded() {
        assert_eq!(shown("a\"b"), r#""a\"b""#);
        assert_eq!(shown(&"ä".repeat(64)), format!("{:?}", "ä".repeat(64)));
        assert_eq!(shown(&"ä".repeat(65)), format!("{:?}...", "ä".repeat(64)));
    }

    #[test]
    fn port_names() {
        for (name, expected) in [
            ("", true),
            ("http", true),
            ("HTTP-2.x_y", true),
            (&*"p".repeat(63), true),
            (&*"p".repeat(64), false),
            ("a\"b", false),
            ("a b", false),
            ("ä", false),
            ("a\n", false),
        ] {
            assert_eq!(is_port_name(name), expected, "{name:?}");
        }
    }
}
