//! Which slot each backend of a pool has.

use std::collections::HashMap;

use crate::model::Backend;

/// Gives each backend a slot, so that as few as possible change theirs: who stays keeps its slot
/// if that is still below the number of backends; who must move or comes fills the gaps. A backend
/// that is listed several times has as many slots.
pub(super) fn assign_slots(previous: &[Backend], backends: &[Backend]) -> Vec<Backend> {
    if previous.is_empty() {
        return backends.to_vec();
    }
    let mut homeless: HashMap<&Backend, usize> = HashMap::with_capacity(backends.len());
    for backend in backends {
        *homeless.entry(backend).or_default() += 1;
    }
    let mut takes_place = |backend: &Backend| {
        let left = homeless.get_mut(backend).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    };
    let mut slots: Vec<Option<Backend>> = vec![None; backends.len()];
    for (slot, backend) in slots.iter_mut().zip(previous) {
        *slot = takes_place(backend).then_some(*backend);
    }
    let mut rest = backends.iter().filter(|backend| takes_place(backend));
    slots
        .into_iter()
        .map(|slot| slot.or_else(|| rest.next().copied()).expect("as many backends as slots"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(numbers: &[u16]) -> Vec<Backend> {
        let address = "10.0.0.1".parse().unwrap();
        numbers.iter().map(|port| Backend { address, port: *port }).collect()
    }

    #[test]
    fn slots_stay_where_they_can() {
        let table: &[(&[u16], &[u16], &[u16])] = &[
            (&[], &[1, 2, 3], &[1, 2, 3]),
            (&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]),
            (&[3, 1, 2], &[1, 2, 3], &[3, 1, 2]),
            // The last moves into the gap.
            (&[1, 2, 3], &[2, 3], &[3, 2]),
            (&[1, 2, 3], &[1, 2], &[1, 2]),
            // Who comes goes to the end, or into a gap.
            (&[2, 3], &[1, 2, 3], &[2, 3, 1]),
            (&[1, 2, 3], &[2, 3, 4], &[4, 2, 3]),
            (&[1, 2, 3], &[], &[]),
            // A listing that says nonsense cannot make a backend appear twice.
            (&[1, 1, 1], &[1, 2, 3], &[1, 2, 3]),
            // One that is listed more often has more slots.
            (&[], &[1, 1, 2], &[1, 1, 2]),
            (&[2, 1, 1], &[1, 1, 2], &[2, 1, 1]),
            (&[1, 2], &[1, 1, 1, 2], &[1, 2, 1, 1]),
            (&[1, 2, 1, 1], &[1, 2, 2], &[1, 2, 2]),
        ];
        for (previous, wanted, expected) in table {
            let got = assign_slots(&backends(previous), &backends(wanted));
            assert_eq!(got, backends(expected), "{previous:?} -> {wanted:?}");
        }
    }
}
