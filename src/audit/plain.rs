//! Rules out of the listing that nft prints for people.
//!
//! That is the form in which a rule of ours has its text, so there is little to do. It is only
//! looked at where the JSON is broken ([`super::nft::Nft::list`]).

use super::table::{Count, Rule};

/// What a line says that we look for.
pub(super) enum Line<'a> {
    /// The flags of a table.
    Flags { family: &'a str, table: &'a str, flags: Vec<&'a str> },
    /// A rule.
    Rule { family: &'a str, table: &'a str, chain: &'a str, rule: &'a str },
}

/// Calls `each` for every line of interest. Nesting is by tabs: tables have none, chains one, rules
/// two.
pub(super) fn read<'a>(listing: &'a str, mut each: impl FnMut(Line<'a>)) {
    let (mut family, mut table, mut chain) = ("", "", None);
    for line in listing.lines() {
        let depth = line.len() - line.trim_start_matches('\t').len();
        let body = &line[depth..];
        match depth {
            0 => {
                if let Some(name) = body.strip_prefix("table ").and_then(|b| b.strip_suffix(" {")) {
                    (family, table) = name.split_once(' ').unwrap_or((name, ""));
                }
                chain = None;
            }
            1 => {
                if let Some(flags) = body.strip_prefix("flags ") {
                    let flags = flags.split([',', ' ']).filter(|flag| !flag.is_empty()).collect();
                    each(Line::Flags { family, table, flags });
                }
                chain = body.strip_prefix("chain ").and_then(|b| b.strip_suffix(" {"));
            }
            2 => {
                let Some(chain) = chain else { continue };
                let head = body.starts_with("comment \"")
                    || (body.starts_with("type ") && body.contains(" hook "));
                if !head {
                    each(Line::Rule { family, table, chain, rule: body });
                }
            }
            _ => {}
        }
    }
}

/// A rule of ours from its line, whose text is the line but for the values of counters.
pub(super) fn rule(line: &str) -> Rule {
    let mut counts = Vec::new();
    let mut words: Vec<&str> = line.split(' ').collect();
    for index in 0..words.len().saturating_sub(4) {
        if words[index] != "counter" || words[index + 1] != "packets" || words[index + 3] != "bytes"
        {
            continue;
        }
        if let (Ok(packets), Ok(bytes)) = (words[index + 2].parse(), words[index + 4].parse()) {
            counts.push(Count { packets, bytes });
            (words[index + 2], words[index + 4]) = ("0", "0");
        }
    }
    Rule { text: words.join(" "), counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_and_flags_are_found() {
        let listing = "# Warning: somebody else's
table inet portcullis {
\tflags dormant,persist
\tcomment \"x\"

\tset s {
\t\ttype ipv4_addr
\t\telements = { 10.0.0.1,
\t\t\t     10.0.0.2 }
\t}

\tchain fw-a/b {
\t\tcomment \"chain\"
\t\ttype filter hook input priority filter; policy accept;
\t\tip saddr @s counter packets 7 bytes 420 accept comment \"rule\"
\t}
}
table ip6 other {
\tflags 
\tchain c {
\t\tdrop
\t}
}
";
        let mut lines = Vec::new();
        read(listing, |line| {
            lines.push(match line {
                Line::Flags { family, table, flags } => format!("{family} {table} {flags:?}"),
                Line::Rule { family, table, chain, rule } => {
                    format!("{family} {table} {chain}: {rule}")
                }
            });
        });
        assert_eq!(
            lines,
            [
                "inet portcullis [\"dormant\", \"persist\"]",
                "inet portcullis fw-a/b: ip saddr @s counter packets 7 bytes 420 accept comment \"rule\"",
                "ip6 other []",
                "ip6 other c: drop",
            ]
        );
    }

    #[test]
    fn counters_are_kept_aside() {
        type Case = (&'static str, &'static str, &'static [(u64, u64)]);
        let table: &[Case] = &[
            ("accept", "accept", &[]),
            ("counter packets 7 bytes 420", "counter packets 0 bytes 0", &[(7, 420)]),
            (
                "counter packets 7 bytes 420 log prefix \"a\" counter packets 1 bytes 2 drop",
                "counter packets 0 bytes 0 log prefix \"a\" counter packets 0 bytes 0 drop",
                &[(7, 420), (1, 2)],
            ),
            ("counter packets many bytes few", "counter packets many bytes few", &[]),
            ("counter packets 7", "counter packets 7", &[]),
        ];
        for (line, text, counts) in table {
            let got = rule(line);
            let counts: Vec<Count> = counts
                .iter()
                .map(|(packets, bytes)| Count { packets: *packets, bytes: *bytes })
                .collect();
            assert_eq!(got, Rule { text: (*text).into(), counts }, "{line}");
        }
    }
}
