//! From a file's text to the texts of its documents.

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Documents between `---` lines.
    Yaml,
    /// One document.
    Json,
}

/// The text of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk<'a> {
    /// Which document of the file, counted from 1.
    pub(super) number: usize,
    /// The line of the file on which `text` begins, counted from 1.
    pub(super) first_line: usize,
    pub(super) text: &'a str,
}

/// How many documents a file may have: more than fit into [`super::LARGEST_FILE`] if each of them
/// holds an object.
pub(super) const MOST_DOCUMENTS: usize = 250_000;

/// Splits a file into documents, by text alone: a malformed document cannot hide the others. YAML
/// allows this because a line that begins with `---` or `...` ends a document wherever it stands
/// (YAML 1.2.2, 9.1.3 and 9.1.4).
///
/// Empty documents have a number but are left out. Behind more than [`MOST_DOCUMENTS`] it ends.
pub(super) fn split(text: &str, syntax: Syntax) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if syntax == Syntax::Json {
        return vec![Chunk { number: 1, first_line: 1, text }];
    }
    let mut chunks: Vec<Chunk<'_>> = Vec::new();
    let mut start = Start { offset: 0, number: 1, line: 1, marked: false };
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = offset + line.len();
        let (begins, ends) = (is_marker(line, "---"), is_marker(line, "..."));
        if begins || ends {
            let chunk = start.chunk(text, offset);
            let number = start.number + usize::from(start.marked || chunk.is_some());
            chunks.extend(chunk);
            if begins && number == start.number {
                // What stands above it is its head.
                start.marked = true;
            } else if begins {
                start = Start { offset, number, line: index + 1, marked: true };
            } else {
                start = Start { offset: end, number, line: index + 2, marked: false };
            }
            if chunks.len() > MOST_DOCUMENTS {
                return chunks;
            }
        }
        offset = end;
    }
    chunks.extend(start.chunk(text, text.len()));
    chunks
}

/// Where a document begins, and whether a `---` says so.
struct Start {
    offset: usize,
    number: usize,
    line: usize,
    marked: bool,
}

impl Start {
    /// The document from here to `end`, if anything is in it. Directives and comments alone are
    /// nothing: they belong to the document that begins behind them.
    fn chunk<'a>(&self, text: &'a str, end: usize) -> Option<Chunk<'a>> {
        let document = &text[self.offset..end];
        let chunk = Chunk { number: self.number, first_line: self.line, text: document };
        document.lines().any(is_content).then_some(chunk)
    }
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

fn is_content(line: &str) -> bool {
    let line = if is_marker(line, "---") { &line[3..] } else { line }.trim();
    !line.is_empty() && !line.starts_with(['#', '%'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<(usize, usize, &str)> {
        let chunks = split(text, Syntax::Yaml).into_iter();
        chunks.map(|chunk| (chunk.number, chunk.first_line, chunk.text)).collect()
    }

    #[test]
    fn splits_at_markers() {
        type Case = (&'static str, &'static [(usize, usize, &'static str)]);
        let table: &[Case] = &[
            ("", &[]),
            ("# nothing\n\n", &[]),
            ("a: 1", &[(1, 1, "a: 1")]),
            ("a: 1\n---\nb: 2\n", &[(1, 1, "a: 1\n"), (2, 2, "---\nb: 2\n")]),
            // A marker at the top begins the first document.
            ("---\na: 1\n", &[(1, 1, "---\na: 1\n")]),
            ("# head\n\n---\na: 1\n", &[(1, 1, "# head\n\n---\na: 1\n")]),
            ("%YAML 1.2\n---\na: 1\n", &[(1, 1, "%YAML 1.2\n---\na: 1\n")]),
            // An empty document has a number too.
            ("a: 1\n---\n---\nb: 2", &[(1, 1, "a: 1\n"), (3, 3, "---\nb: 2")]),
            ("---\n---\nb: 2", &[(2, 2, "---\nb: 2")]),
            ("--- {a: 1}\n--- # b\n---\n", &[(1, 1, "--- {a: 1}\n")]),
            ("a: 1\n--- # b\nb: 2\n", &[(1, 1, "a: 1\n"), (2, 2, "--- # b\nb: 2\n")]),
            ("a: 1\r\n---\r\nb: 2\r\n", &[(1, 1, "a: 1\r\n"), (2, 2, "---\r\nb: 2\r\n")]),
            ("a: 1\n...\n# end\n", &[(1, 1, "a: 1\n")]),
            ("a: 1\n...\nb: 2\n", &[(1, 1, "a: 1\n"), (2, 3, "b: 2\n")]),
            ("a: 1\n...\n---\nb: 2\n", &[(1, 1, "a: 1\n"), (2, 3, "---\nb: 2\n")]),
            // No markers.
            ("a: |\n  ---\n----\n---x\n", &[(1, 1, "a: |\n  ---\n----\n---x\n")]),
            ("\u{feff}a: 1\n", &[(1, 1, "a: 1\n")]),
        ];
        for (text, expected) in table {
            assert_eq!(texts(text), *expected, "{text:?}");
        }
        assert_eq!(split("{}\n---\n", Syntax::Json).len(), 1);
        assert_eq!(split(&"---\n".repeat(MOST_DOCUMENTS * 2), Syntax::Yaml).len(), 0);
        let many = "---\na\n".repeat(MOST_DOCUMENTS * 2);
        assert_eq!(split(&many, Syntax::Yaml).len(), MOST_DOCUMENTS + 1);
    }
}
