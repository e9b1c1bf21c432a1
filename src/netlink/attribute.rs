//! Writing and reading netlink attributes (`struct nlattr`, include/uapi/linux/netlink.h).

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 4;

/// Appends an attribute with `value`, padded to four bytes.
pub fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(HEADER + value.len()).expect("an attribute holds at most 64 KiB");
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends a big-endian number, as nf_tables has all its numbers.
pub fn put_u16(out: &mut Vec<u8>, kind: u16, value: u16) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends a big-endian number.
pub fn put_u32(out: &mut Vec<u8>, kind: u16, value: u32) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends a big-endian number.
pub fn put_u64(out: &mut Vec<u8>, kind: u16, value: u64) {
    put(out, kind, &value.to_be_bytes());
}

/// Appends a NUL-terminated string.
pub fn put_str(out: &mut Vec<u8>, kind: u16, value: &str) {
    let length = u16::try_from(HEADER + value.len() + 1).expect("a name is shorter than 64 KiB");
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends a nested attribute whose content `fill` appends.
pub fn nest(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = open(out, kind);
    fill(out);
    close(out, start);
}

/// Begins a nested attribute; [`close`] ends it. For nests that stay open between calls.
pub fn open(out: &mut Vec<u8>, kind: u16) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&(kind | NESTED).to_ne_bytes());
    start
}

/// Ends the nested attribute that [`open`] began at `start`.
pub fn close(out: &mut [u8], start: usize) {
    let length = u16::try_from(out.len() - start).expect("a nest holds at most 64 KiB");
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
}

/// The attributes in `bytes` with their types. Stops at the first that is cut short.
pub fn iter(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    with_flags(bytes).map(|(kind, value)| (kind & TYPE_MASK, value))
}

fn with_flags(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Whether all attributes that were `written` here are among those `listed`, with the same values.
/// The kernel lists what it was not told, too, and does not always mark nests as such.
pub fn are_among(written: &[u8], listed: &[u8]) -> bool {
    with_flags(written).all(|(kind, value)| {
        find(listed, kind & TYPE_MASK).is_some_and(|listed| match kind & NESTED {
            0 => value == listed,
            _ => are_among(value, listed),
        })
    })
}

/// The value of the first attribute of type `kind`.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    iter(bytes).find_map(|(k, value)| (k == kind).then_some(value))
}

/// A NUL-terminated string; invalid UTF-8 is replaced.
pub fn string(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A big-endian number of four bytes; `None` if `value` has another length.
pub fn u32_of(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// A big-endian number of eight bytes; `None` if `value` has another length.
pub fn u64_of(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(value.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut out = Vec::new();
        put_u32(&mut out, 1, 7);
        nest(&mut out, 2, |out| {
            put_str(out, 3, "lo");
            put(out, 4, &[1, 2, 3, 4, 5]);
        });
        put_u64(&mut out, 5, u64::MAX);
        assert_eq!(out.len() % 4, 0);
        let kinds: Vec<u16> = iter(&out).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [1, 2, 5]);
        let nested = find(&out, 2).unwrap();
        assert_eq!(string(find(nested, 3).unwrap()), "lo");
        assert_eq!(find(nested, 4).unwrap(), [1, 2, 3, 4, 5]);
        assert_eq!(u64_of(find(&out, 5).unwrap()), Some(u64::MAX));
    }

    #[test]
    fn what_is_listed_may_say_more() {
        let write = |rule: &str, more: bool, nested: u16| {
            let mut out = Vec::new();
            if more {
                put_u32(&mut out, 9, 1);
            }
            let start = open(&mut out, 2);
            put_str(&mut out, 3, rule);
            if more {
                put_u32(&mut out, 9, 2);
            }
            close(&mut out, start);
            out[start + 2..start + 4].copy_from_slice(&(2 | nested).to_ne_bytes());
            out
        };
        let written = write("drop", false, NESTED);
        assert!(are_among(&written, &written));
        assert!(are_among(&written, &write("drop", true, 0)));
        assert!(!are_among(&write("drop", true, NESTED), &written));
        assert!(!are_among(&written, &write("accept", true, 0)));
        assert!(!are_among(&written, &[]));
    }

    #[test]
    fn reading_stops_at_nonsense() {
        for bytes in [&[][..], &[1], &[3, 0, 1, 0], &[9, 0, 1, 0, 5], &[0; 8]] {
            assert_eq!(iter(bytes).count(), 0, "{bytes:?}");
        }
    }
}
