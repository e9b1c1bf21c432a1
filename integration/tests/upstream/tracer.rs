//! The nf_tables machine in a few lines: sends the first packet of a connection through our rules
//! and elements, as the kernel would.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use portcullis::model::{Family, Protocol};
use portcullis::netlink::{
    CmpOp, CtKey, CtOriginalKey, Data, Expression, Hook, MetaKey, PayloadBase, Register, Verdict,
};
use portcullis::ruleset::{
    BASE_CHAINS, Contribution, Element, ElementKey, KeyBytes, SetName, Value, base_rules,
};

/// The first packet of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub protocol: Protocol,
    pub source: IpAddr,
    pub destination: SocketAddr,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    Dropped,
    Rejected,
    /// It goes on, to this endpoint if it was translated.
    Passed {
        to: Option<SocketAddr>,
        masqueraded: bool,
    },
}

/// A node with a ruleset.
pub struct Tracer {
    local_addresses: Vec<IpAddr>,
    chains: BTreeMap<String, Vec<Vec<Expression>>>,
    sets: BTreeMap<String, Vec<Element>>,
}

/// How a chain, or the chains of a hook, end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With the last rule.
    Reached,
    Accepted,
    Dropped,
    Rejected,
}

impl Tracer {
    /// The node with these addresses and the ruleset that `contributions` add up to.
    pub fn new(local_addresses: Vec<IpAddr>, contributions: &[Contribution]) -> Tracer {
        let mut chains: BTreeMap<String, Vec<Vec<Expression>>> = BTreeMap::new();
        for (chain, rule) in base_rules() {
            chains.entry(chain.to_owned()).or_default().push(rule.expressions);
        }
        let mut sets: BTreeMap<String, Vec<Element>> = BTreeMap::new();
        for contribution in contributions {
            let shared = contribution.shared_chains();
            let firewall = contribution.firewall();
            let of_shared = shared.iter().map(|chain| (chain.name(), chain.rules()));
            let of_firewall = firewall.iter().map(|chain| (chain.name(), chain.rules()));
            for (name, rules) in of_shared.chain(of_firewall) {
                let rules = rules.into_iter().map(|rule| rule.expressions).collect();
                chains.insert(name, rules);
            }
            let mut add = |element: Element| {
                sets.entry(element.key.set.name().into_owned()).or_default().push(element);
            };
            contribution.elements(&mut add);
            contribution.hairpins().into_iter().map(hairpin).for_each(add);
        }
        Tracer { local_addresses, chains, sets }
    }

    /// What becomes of the packet, once for each number that may be drawn on its way.
    pub fn fates(&self, packet: Packet) -> Vec<Fate> {
        let mut fates = Vec::new();
        let mut draws = 1;
        while fates.len() < draws {
            let draw = u32::try_from(fates.len()).expect("few endpoints");
            let mut walk = Walk::new(self, packet, draw);
            fates.push(walk.fate());
            draws = draws.max(walk.modulus as usize);
        }
        fates
    }

    /// `RTN_LOCAL` or `RTN_UNICAST`, include/uapi/linux/rtnetlink.h.
    fn route_type(&self, address: IpAddr) -> u32 {
        if self.local_addresses.contains(&address) { 2 } else { 1 }
    }

    fn find(&self, set: &str, key: &[u8]) -> Option<&Value> {
        let here = |element: &&Element| {
            let (first, end) = (element.key.bytes.as_slice(), element.key.end);
            let key = &key[..first.len()];
            if element.key.set.spec().interval {
                first <= key && end.is_none_or(|end| key < end.as_slice())
            } else {
                first == key
            }
        };
        self.sets.get(set)?.iter().find(here).map(|element| &element.value)
    }
}

/// The element that stands for an endpoint here that may be balanced to itself.
fn hairpin(address: IpAddr) -> Element {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let set = SetName::Hairpin(Family::of(address));
    let bytes = KeyBytes::new(&[&octets[..], &octets[..]].concat()).expect("a key");
    Element { key: ElementKey { set, bytes, end: None }, value: Value::None, comment: None }
}

/// A packet on its way.
struct Walk<'a> {
    tracer: &'a Tracer,
    original: Packet,
    /// Where it goes now.
    destination: SocketAddr,
    /// The name of the interface that it came in by, as long as a rule may ask.
    interface: [u8; 16],
    mark: u32,
    translated: bool,
    masqueraded: bool,
    /// The number that is drawn, and of how many.
    draw: u32,
    modulus: u32,
    registers: [u8; 80],
}

/// Whether a rule goes on.
enum Step {
    Next,
    /// The rule ends; the chain goes on.
    Break,
    Verdict(Verdict),
    Rejected,
}

impl<'a> Walk<'a> {
    fn new(tracer: &'a Tracer, packet: Packet, draw: u32) -> Walk<'a> {
        Walk {
            tracer,
            original: packet,
            destination: packet.destination,
            interface: [0; 16],
            mark: 0,
            translated: false,
            masqueraded: false,
            draw,
            modulus: 1,
            registers: [0; 80],
        }
    }

    fn fate(&mut self) -> Fate {
        let from_here = self.tracer.local_addresses.contains(&self.original.source);
        let first = if from_here { Hook::Output } else { Hook::Prerouting };
        if !from_here {
            self.interface[..4].copy_from_slice(b"eth0");
        }
        let mut hooks = vec![first];
        let mut index = 0;
        while let Some(hook) = hooks.get(index) {
            match self.hook(*hook) {
                End::Dropped => return Fate::Dropped,
                End::Rejected => return Fate::Rejected,
                End::Reached | End::Accepted => {}
            }
            if index == 0 {
                let to_here = self.tracer.local_addresses.contains(&self.destination.ip());
                hooks.extend(match (from_here, to_here) {
                    (true, _) => vec![Hook::Postrouting],
                    (false, true) => vec![Hook::Input],
                    (false, false) => vec![Hook::Forward, Hook::Postrouting],
                });
            }
            index += 1;
        }
        let to = self.translated.then_some(self.destination);
        Fate::Passed { to, masqueraded: self.masqueraded }
    }

    /// All chains of the hook, in the order of their priorities.
    fn hook(&mut self, hook: Hook) -> End {
        let mut chains: Vec<(i32, &str)> = BASE_CHAINS
            .iter()
            .filter_map(|chain| Some((chain.hooked?, chain.name)))
            .filter(|(hooked, _)| hooked.hook == hook)
            .map(|(hooked, name)| (hooked.priority, name))
            .collect();
        chains.sort_unstable();
        for (_, chain) in chains {
            let end = self.chain(chain);
            if matches!(end, End::Dropped | End::Rejected) {
                return end;
            }
        }
        End::Reached
    }

    fn chain(&mut self, name: &str) -> End {
        let tracer = self.tracer;
        let rules = tracer.chains.get(name).unwrap_or_else(|| panic!("no chain {name}"));
        for rule in rules {
            match self.rule(rule) {
                Step::Next | Step::Break => {}
                Step::Rejected => return End::Rejected,
                Step::Verdict(Verdict::Accept) => return End::Accepted,
                Step::Verdict(Verdict::Drop) => return End::Dropped,
                Step::Verdict(Verdict::Return) => return End::Reached,
                Step::Verdict(Verdict::Goto(chain)) => return self.chain(&chain),
                Step::Verdict(Verdict::Jump(chain)) => match self.chain(&chain) {
                    End::Reached => {}
                    end => return end,
                },
            }
        }
        End::Reached
    }

    fn rule(&mut self, expressions: &[Expression]) -> Step {
        self.registers = [0; 80];
        for expression in expressions {
            match self.step(expression) {
                Step::Next => {}
                end => return end,
            }
        }
        Step::Next
    }

    fn step(&mut self, expression: &Expression) -> Step {
        let go_on_if = |condition| if condition { Step::Next } else { Step::Break };
        match expression {
            Expression::Payload { base, offset, length, into } => {
                let header = self.header(*base);
                let bytes = &header[*offset as usize..][..*length as usize];
                self.store(*into, bytes);
            }
            Expression::Meta { key, into } => match key {
                MetaKey::Mark => self.store(*into, &self.mark.to_ne_bytes()),
                MetaKey::IifName => self.store(*into, &self.interface.clone()),
                // NFPROTO_IPV4, NFPROTO_IPV6
                MetaKey::NfProto => match self.family() {
                    Family::V4 => self.store(*into, &[2]),
                    Family::V6 => self.store(*into, &[10]),
                },
                MetaKey::L4Proto => self.store(*into, &[self.original.protocol.number()]),
            },
            Expression::MetaSet { key: MetaKey::Mark, from } => {
                let bytes = self.load(*from).first_chunk().expect("four bytes");
                self.mark = u32::from_ne_bytes(*bytes);
            }
            // NF_CT_STATE_BIT(IP_CT_NEW), IPS_DST_NAT
            Expression::Ct { key: CtKey::State, into } => self.store(*into, &8_u32.to_ne_bytes()),
            Expression::Ct { key: CtKey::Status, into } => {
                let status = if self.translated { 1_u32 << 5 } else { 0 };
                self.store(*into, &status.to_ne_bytes());
            }
            Expression::CtOriginal { key, into } => match self.original_tuple(*key) {
                Some(bytes) => self.store(*into, &bytes),
                None => return Step::Break,
            },
            Expression::FibDaddrType { into } => {
                let kind = self.tracer.route_type(self.destination.ip());
                self.store(*into, &kind.to_ne_bytes());
            }
            Expression::FibSaddrType { into } => {
                let kind = self.tracer.route_type(self.original.source);
                self.store(*into, &kind.to_ne_bytes());
            }
            // Whatever the hash is, it is one of these.
            Expression::NumgenRandom { modulus, offset, into }
            | Expression::JenkinsHash { modulus, offset, into, .. } => {
                self.modulus = *modulus;
                self.store(*into, &(offset + self.draw % modulus).to_ne_bytes());
            }
            Expression::Bitwise { register, mask, xor } => {
                let bytes = self.load(*register).iter().zip(mask).zip(xor);
                let bytes: Vec<u8> = bytes.map(|((byte, mask), xor)| byte & mask ^ xor).collect();
                self.store(*register, &bytes);
            }
            Expression::Cmp { register, op, with } => {
                let equal = self.load(*register).starts_with(with);
                return go_on_if(equal == (*op == CmpOp::Eq));
            }
            Expression::Lookup { set, key } => {
                return go_on_if(self.tracer.find(set, self.load(*key)).is_some());
            }
            Expression::LookupInverted { set, key } => {
                return go_on_if(self.tracer.find(set, self.load(*key)).is_none());
            }
            Expression::LookupMap { map, key, into } => {
                match self.tracer.find(map, self.load(*key)) {
                    None => return Step::Break,
                    Some(Value::Drop) => return Step::Verdict(Verdict::Drop),
                    Some(Value::Goto(chain)) => {
                        return Step::Verdict(Verdict::Goto(chain.name()));
                    }
                    Some(Value::Endpoint(bytes)) => self.store(*into, bytes.as_slice()),
                    Some(Value::None) => panic!("{map} leads to nothing"),
                }
            }
            Expression::Immediate { data: Data::Verdict(verdict), .. } => {
                return Step::Verdict(verdict.clone());
            }
            Expression::Nat { family, address, port, .. } => {
                let port = u16::from_be_bytes(*self.load(*port).first_chunk().expect("two bytes"));
                let address = self.load(*address);
                let address = match family {
                    Family::V4 => IpAddr::from(*address.first_chunk::<4>().expect("four bytes")),
                    Family::V6 => IpAddr::from(*address.first_chunk::<16>().expect("16 bytes")),
                };
                self.destination = (address, port).into();
                self.translated = true;
                return Step::Verdict(Verdict::Accept);
            }
            Expression::MasqueradeFullyRandom => {
                self.masqueraded = true;
                return Step::Verdict(Verdict::Accept);
            }
            Expression::RejectPortUnreachable | Expression::RejectTcpReset => {
                return Step::Rejected;
            }
            // Nobody connected before, so nobody is remembered.
            Expression::UpdateMap { .. }
            | Expression::DeleteFromMap { .. }
            | Expression::Counter
            | Expression::Limit { .. }
            | Expression::LogGroup { .. } => {}
            Expression::MetaSet { .. } | Expression::Immediate { .. } => {
                panic!("{expression:?} is in no rule of ours")
            }
        }
        Step::Next
    }

    fn family(&self) -> Family {
        Family::of(self.original.source)
    }

    /// The bytes of a header that a rule may ask for, the others zero.
    fn header(&self, base: PayloadBase) -> [u8; 40] {
        let mut header = [0; 40];
        let mut put = |offset: usize, bytes: &[u8]| {
            header[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        match (base, self.original.source, self.destination.ip()) {
            (PayloadBase::Transport, ..) => put(2, &self.destination.port().to_be_bytes()),
            // struct iphdr
            (PayloadBase::Network, IpAddr::V4(source), IpAddr::V4(destination)) => {
                put(12, &source.octets());
                put(16, &destination.octets());
            }
            // struct ipv6hdr
            (PayloadBase::Network, IpAddr::V6(source), IpAddr::V6(destination)) => {
                put(8, &source.octets());
                put(24, &destination.octets());
            }
            (_, source, destination) => panic!("{source} and {destination} are of two families"),
        }
        header
    }

    /// `None` where the connection is of another family.
    fn original_tuple(&self, key: CtOriginalKey) -> Option<Vec<u8>> {
        let Packet { source, destination, .. } = self.original;
        match (key, source, destination.ip()) {
            (CtOriginalKey::DestinationPort, ..) => Some(destination.port().to_be_bytes().to_vec()),
            (CtOriginalKey::SourceIp4, IpAddr::V4(address), _)
            | (CtOriginalKey::DestinationIp4, _, IpAddr::V4(address)) => {
                Some(address.octets().to_vec())
            }
            (CtOriginalKey::SourceIp6, IpAddr::V6(address), _)
            | (CtOriginalKey::DestinationIp6, _, IpAddr::V6(address)) => {
                Some(address.octets().to_vec())
            }
            _ => None,
        }
    }

    /// Everything from the register on.
    fn load(&self, register: Register) -> &[u8] {
        &self.registers[start(register)..]
    }

    /// Fills the register, and what is left of its last four bytes with zeros.
    fn store(&mut self, register: Register, bytes: &[u8]) {
        let place = &mut self.registers[start(register)..][..bytes.len().next_multiple_of(4)];
        place.fill(0);
        place[..bytes.len()].copy_from_slice(bytes);
    }
}

/// The byte at which a register begins.
fn start(register: Register) -> usize {
    let word = (0..20).find(|word| Register::word(*word) == register);
    word.expect("a data register") as usize * 4
}
