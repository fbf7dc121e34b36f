//! Thresholds by the share of benign prompts that they let fire, and how sure that share is.

use crate::guard::OperatingPoint;
use statrs::distribution::{Beta, ContinuousCDF};

/// Shares of benign prompts for which thresholds are kept.
pub const RATES: [f64; 6] = [0.001, 0.005, 0.01, 0.02, 0.05, 0.1];
/// Of the interval that is kept with each.
const CONFIDENCE: f64 = 0.95;

/// Bounds of the share of all prompts that fire, where `fired` of `n` did: the exact interval that holds it with that `confidence` (Clopper and
/// Pearson, "The Use of Confidence or Fiducial Limits", 1934).
pub fn clopper_pearson(fired: usize, n: usize, confidence: f64) -> (f64, f64) {
    let outside = (1.0 - confidence) / 2.0;
    let low = if fired == 0 { 0.0 } else { beta_quantile(fired, n - fired + 1, outside) };
    (low, upper_bound(fired, n, 1.0 - outside))
}

/// The share that all prompts' own is not above with that `confidence`, where `fired` of `n` did.
fn upper_bound(fired: usize, n: usize, confidence: f64) -> f64 {
    if fired >= n { 1.0 } else { beta_quantile(fired + 1, n - fired, confidence) }
}

/// By bisection on the distribution function, to the last bits that matter: thresholds hang on it.
fn beta_quantile(a: usize, b: usize, share: f64) -> f64 {
    let beta = Beta::new(a as f64, b as f64).expect("shapes above 0");
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if beta.cdf(middle) < share { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// Prompts that are needed for a threshold that none of them reaches to have a share of at most `rate` with that `confidence`.
pub(super) fn prompts_needed(rate: f64, confidence: f64) -> usize {
    // (1 − rate)ⁿ ≤ 1 − confidence
    ((1.0 - confidence).ln() / (-rate).ln_1p()).ceil() as usize
}

/// The lowest threshold that lets at most the share `rate` of the `benign` scores fire; with a `confidence`, at most that share of all such prompts,
/// as sure as that. `positive` scores say what share of them fires at it. `None` where there are too few prompts to be so sure.
pub(super) fn operating_point(
    benign: &[f64],
    positive: &[f64],
    rate: f64,
    confidence: Option<f64>,
) -> Option<OperatingPoint> {
    let n = benign.len();
    let mut highest_first = benign.to_vec();
    highest_first.sort_by(|a, b| b.total_cmp(a));
    let fits = |fired: usize| match confidence {
        // Room for a rate times a number of prompts that is whole but for rounding.
        None => fired as f64 <= rate * n as f64 * (1.0 + 1e-12),
        Some(confidence) => upper_bound(fired, n, confidence) <= rate,
    };
    let most = (0..=n).take_while(|fired| fits(*fired)).last()?;
    // Scores alike fire together.
    let apart = |fired: &usize| *fired == 0 || *fired == n || highest_first[fired - 1] > highest_first[*fired];
    let fired = (0..=most).rev().find(apart).unwrap_or(0);
    let threshold = match fired {
        0 => {
            let lower = highest_first.iter().find(|score| **score < highest_first[0]);
            highest_first[0] + lower.map_or(1.0, |lower| (highest_first[0] - lower) / 2.0)
        }
        _ if fired == n => highest_first[n - 1],
        _ => f64::midpoint(highest_first[fired - 1], highest_first[fired]),
    };
    let fires = |scores: &[f64]| scores.iter().filter(|score| **score >= threshold).count();
    let fired = fires(benign);
    let (low, high) = clopper_pearson(fired, n, CONFIDENCE);
    let detection = (!positive.is_empty()).then(|| fires(positive) as f64 / positive.len() as f64);
    Some(OperatingPoint { rate, threshold, fired, low, high, detection })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        // R: binom.test(k, n)$conf.int
        for (fired, n, low, high) in [
            (0, 10, 0.0, 0.308_497_1),
            (1, 10, 0.002_528_579, 0.445_016_1),
            (5, 10, 0.187_086_0, 0.812_914_0),
            (10, 10, 0.691_502_9, 1.0),
        ] {
            let found = clopper_pearson(fired, n, 0.95);
            assert!((found.0 - low).abs() < 1e-6 && (found.1 - high).abs() < 1e-6, "{fired} of {n}: {found:?}");
        }
        // No event in n: 1 − (α/2)^(1/n).
        let (_, high) = clopper_pearson(0, 300, 0.95);
        assert!((high - (1.0 - 0.025f64.powf(1.0 / 300.0))).abs() < 1e-12);
    }

    #[test]
    fn a_threshold_lets_no_more_fire_than_it_may() {
        let benign: Vec<f64> = (0..200).map(|n| f64::from(n * 7919 % 200) / 10.0).collect();
        let positive: Vec<f64> = (0..50).map(|n| 17.0 + f64::from(n) / 10.0).collect();
        for rate in [0.0, 0.004, 0.005, 0.01, 0.05, 0.5, 1.0] {
            let point = operating_point(&benign, &positive, rate, None).unwrap();
            assert_eq!(point.fired, (rate * 200.0 + 1e-9) as usize, "{point:?}");
            assert!(point.low <= point.fired as f64 / 200.0 && point.fired as f64 / 200.0 <= point.high);
            let fires = positive.iter().filter(|score| **score >= point.threshold).count();
            assert_eq!(point.detection, Some(fires as f64 / 50.0));
        }
        // Alike: all or none.
        let tied = [1.0, 1.0, 1.0, 0.0];
        let point = operating_point(&tied, &[], 0.5, None).unwrap();
        assert_eq!((point.fired, point.threshold, point.detection), (0, 1.5, None));
    }

    #[test]
    fn being_sure_takes_prompts() {
        let benign: Vec<f64> = (0..1000).map(f64::from).collect();
        let plain = operating_point(&benign, &[], 0.05, None).unwrap();
        let sure = operating_point(&benign, &[], 0.05, Some(0.95)).unwrap();
        assert_eq!(plain.fired, 50);
        assert!((30..50).contains(&sure.fired) && sure.threshold > plain.threshold, "{sure:?}");
        assert!(upper_bound(sure.fired, 1000, 0.95) <= 0.05 && upper_bound(sure.fired + 1, 1000, 0.95) > 0.05);
        // The rule of three, exactly: 59 prompts for 5 %.
        assert_eq!(prompts_needed(0.05, 0.95), 59);
        assert!(operating_point(&benign[..58], &[], 0.05, Some(0.95)).is_none());
        assert_eq!(operating_point(&benign[..59], &[], 0.05, Some(0.95)).unwrap().fired, 0);
    }
}
