//! Whether counts fit weights: Pearson's chi-squared test.

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::Tally;

/// Below this a distribution is not believed to be the expected one. A correct balancer fails a
/// test with it once in a million runs; one that gives a server of three twice its share is
/// found with some hundred probes.
pub const SIGNIFICANCE: f64 = 1e-6;

/// The probability that counts at least as uneven as `observed` come from `weights`.
///
/// Both have the same length, at least 2, and every weight is positive. Each expected count
/// should be at least 5, or the approximation is poor.
#[allow(clippy::cast_precision_loss)] // counts of a test are far below 2^52
pub fn p_value(observed: &[u64], weights: &[u64]) -> f64 {
    assert_eq!(observed.len(), weights.len(), "a weight for each count");
    assert!(observed.len() >= 2, "one count fits everything");
    assert!(weights.iter().all(|weight| *weight > 0), "weights are positive");
    let total = observed.iter().sum::<u64>() as f64;
    let weight = weights.iter().sum::<u64>() as f64;
    assert!(total > 0.0, "nothing was counted");
    let statistic: f64 = observed
        .iter()
        .zip(weights)
        .map(|(count, share)| {
            let expected = total * *share as f64 / weight;
            (*count as f64 - expected).powi(2) / expected
        })
        .sum();
    let freedom = (observed.len() - 1) as f64;
    ChiSquared::new(freedom).expect("degrees of freedom are positive").sf(statistic)
}

/// Panics unless exactly the servers that `weights` names answered, everything was answered, and
/// the counts fit the weights.
pub fn assert_fits(tally: &Tally, weights: &[(&str, u64)]) {
    let lost = tally.refused + tally.timed_out + tally.unreachable;
    assert_eq!(lost, 0, "not everything was answered: {tally:?}");
    let strangers: Vec<&String> =
        tally.answered.keys().filter(|name| weights.iter().all(|(n, _)| n != name)).collect();
    assert!(strangers.is_empty(), "unexpected servers {strangers:?}: {tally:?}");
    let observed: Vec<u64> = weights.iter().map(|(name, _)| tally.by(name)).collect();
    let expected: Vec<u64> = weights.iter().map(|(_, weight)| *weight).collect();
    let p = p_value(&observed, &expected);
    assert!(p >= SIGNIFICANCE, "{observed:?} does not fit {weights:?} (p = {p:e})");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_match_the_tables() {
        // Close to the critical values 3.841, 6.635 and 10.828 for one degree of freedom.
        for (counts, p) in [([531, 469], 0.04993), ([541, 459], 0.00951), ([552, 448], 0.001_006)] {
            let got = p_value(&counts, &[1, 1]);
            assert!((got - p).abs() < 0.005 * p, "{counts:?}: {got}");
        }
        // Mendel's peas, 315 : 108 : 101 : 32 against 9 : 3 : 3 : 1, statistic 0.470.
        let peas = p_value(&[315, 108, 101, 32], &[9, 3, 3, 1]);
        assert!((peas - 0.925).abs() < 0.001, "{peas}");
        assert!((p_value(&[10, 10, 10], &[1, 1, 1]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_wrong_share_is_found() {
        assert!(p_value(&[200, 100, 100], &[1, 1, 1]) < SIGNIFICANCE);
        assert!(p_value(&[200, 100, 100], &[2, 1, 1]) > 0.99);
        assert!(p_value(&[600, 0], &[1, 1]) < SIGNIFICANCE);
    }
}
