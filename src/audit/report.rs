//! An audit as text for people: one line that says it all, then a section for each thing found.

use std::fmt::{self, Display, Write};

use super::{
    Access, Audit, Change, Count, Difference, ExposedPort, Exposure, Foreign, Object, Position,
};

/// How many differences are printed; JSON has them all.
const DIFFERENCES: usize = 20;
/// How many CIDRs of a Service are printed; likewise.
const CIDRS: usize = 3;

impl Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(DIFFERENCES))
    }
}

impl Audit {
    /// The audit as text, with at most so many differences. Sections that would be empty are left
    /// out.
    pub fn text(&self, differences: usize) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}", self.summary());
        for table in &self.kube_proxy {
            let _ = writeln!(
                out,
                "warning: table {table} looks like kube-proxy's; two proxies on one node undo each other's work"
            );
        }
        let rows = self.differences.iter().take(differences).map(difference_row).collect();
        section(&mut out, "differences", self.differences.len(), rows);
        if let Some(more @ 1..) = self.differences.len().checked_sub(differences) {
            let _ = writeln!(out, "  ... and {more} more");
        }
        let mut rows = vec![head(["SERVICE", "PORT", "WHO", "ENDPOINTS", "ACCEPTED", "REFUSED"])];
        rows.extend(self.exposures.iter().flat_map(exposure_rows));
        section(&mut out, "node ports", rows.len() - 1, rows);
        let mut rows =
            vec![head(["HOOK", "PRIORITY", "TABLE", "CHAIN", "TYPE", "POLICY", "RULES", "ORDER"])];
        rows.extend(self.foreign.iter().map(foreign_row));
        section(&mut out, "base chains of other tables", rows.len() - 1, rows);
        let rows = self.diagnostics.iter().map(|diagnostic| vec![diagnostic.to_string()]).collect();
        section(&mut out, "diagnostics", self.diagnostics.len(), rows);
        out
    }

    /// One line: whether the kernel is as it should be, and what else is worth a look.
    fn summary(&self) -> String {
        let mut facts = Vec::new();
        let ports = |access: &[Access]| {
            let exposures = self.exposures.iter().filter(|e| access.contains(&e.access));
            exposures.flat_map(|e| &e.node_ports).filter(|port| port.lost_to.is_none()).count()
        };
        let everyone = ports(&[Access::Everyone]);
        let restricted = ports(&[Access::Sources, Access::Nobody, Access::Closed]);
        if everyone + restricted > 0 {
            let plural = if everyone == 1 { "" } else { "s" };
            facts.push(format!(
                "{everyone} node port{plural} open to everyone, {restricted} restricted"
            ));
        }
        let broken = self.exposures.iter().filter(|e| !e.in_force && e.access != Access::Everyone);
        facts.extend(some(broken.count(), "firewall NOT IN FORCE", "firewalls NOT IN FORCE"));
        let dropping = self.foreign.iter().filter(|chain| chain.drops).count();
        facts.extend(some(
            dropping,
            "base chain of another table drops by policy",
            "base chains of other tables drop by policy",
        ));
        let differences = some(self.differences.len(), "difference", "differences");
        let verdict = match differences {
            None => "in sync".to_owned(),
            Some(differences) => format!("NOT IN SYNC, {differences}"),
        };
        facts.insert(0, verdict);
        facts.join("; ")
    }
}

/// A number of things, unless it is zero.
fn some(number: usize, one: &str, many: &str) -> Option<String> {
    (number > 0).then(|| format!("{number} {}", if number == 1 { one } else { many }))
}

fn head<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(str::to_owned).to_vec()
}

/// A difference as one line.
#[cfg(test)]
pub(super) fn line(difference: &Difference) -> String {
    difference_row(difference).join(" ")
}

fn difference_row(difference: &Difference) -> Vec<String> {
    let change = match difference.change {
        Change::Missing => "missing",
        Change::Unexpected => "unexpected",
        Change::Changed => "changed",
    };
    let place = match difference.object {
        Object::Table => "table",
        Object::Chain => "chain",
        Object::Rule => "rule in chain",
        Object::Set => "set",
        Object::Element => "element in",
        Object::Other => "object in table",
    };
    let text = match (&difference.expected, &difference.found) {
        (Some(expected), Some(found)) => format!("{found}, should be {expected}"),
        (Some(text), None) | (None, Some(text)) => text.clone(),
        (None, None) => String::new(),
    };
    vec![change.to_owned(), format!("{place} {}", difference.name), text]
}

fn exposure_rows(exposure: &Exposure) -> impl Iterator<Item = Vec<String>> {
    exposure.node_ports.iter().enumerate().map(move |(index, port)| {
        let name = if port.name.is_empty() { String::new() } else { format!(":{}", port.name) };
        // The counters are the Service's, not the port's.
        let count = |count: Option<Count>| match count {
            Some(count) if index == 0 => format!("{} ({} B)", count.packets, count.bytes),
            _ => "-".to_owned(),
        };
        vec![
            format!("{}/{}{name}", exposure.namespace, exposure.service),
            format!("{} {}", port.protocol, port.port),
            who(exposure, port),
            endpoints(port),
            count(exposure.accepted),
            count(exposure.refused),
        ]
    })
}

fn who(exposure: &Exposure, port: &ExposedPort) -> String {
    if let Some(service) = &port.lost_to {
        return format!("not served: belongs to {service}");
    }
    let mut who = match exposure.access {
        Access::Everyone => "everyone".to_owned(),
        Access::Nobody => "nobody".to_owned(),
        Access::Closed => "nobody: declaration not understood".to_owned(),
        Access::Sources => {
            let cidrs = exposure.sources.iter().take(CIDRS).map(ToString::to_string);
            let mut text = cidrs.collect::<Vec<_>>().join(", ");
            if let Some(more @ 1..) = exposure.sources.len().checked_sub(CIDRS) {
                let _ = write!(text, " and {more} more");
            }
            text
        }
    };
    if !exposure.in_force {
        who.push_str(" (NOT IN FORCE)");
    }
    who
}

fn endpoints(port: &ExposedPort) -> String {
    let families =
        port.endpoints.iter().map(|(family, number)| format!("{number} IPv{}", family.digit()));
    families.collect::<Vec<_>>().join(", ")
}

fn foreign_row(chain: &Foreign) -> Vec<String> {
    let device = chain.device.as_ref().map(|d| format!(" ({d})")).unwrap_or_default();
    let policy = if chain.drops { "DROP" } else { "accept" };
    let order = match chain.position {
        Position::Before => "before ours",
        Position::Between => "between ours",
        Position::Beside => "at our priority",
        Position::After => "after ours",
    };
    vec![
        format!("{}{device}", chain.hook),
        chain.priority.to_string(),
        format!("{} {}", chain.family, chain.table),
        chain.chain.clone(),
        chain.kind.clone(),
        policy.to_owned(),
        chain.rules.to_string(),
        order.to_owned(),
    ]
}

/// A heading with the number of things, and the rows in columns as wide as their widest cell.
/// Names and comments of others may hold anything, so what would steer a terminal is left out.
fn section(out: &mut String, title: &str, number: usize, mut rows: Vec<Vec<String>>) {
    if number == 0 {
        return;
    }
    let _ = writeln!(out, "\n{title} ({number})");
    rows.iter_mut().flatten().for_each(|cell| cell.retain(|c| !c.is_control()));
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let mut widths = vec![0; columns];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(&row) {
            let _ = write!(line, "  {cell:<width$}");
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
}
