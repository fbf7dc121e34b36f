//! Figures with their uncertainty: how well scores separate two classes, and shares of prompts.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Resamples of a bootstrap.
pub const RESAMPLES: usize = 2000;

/// False-positive rates at which the true-positive rate is told.
pub const LOW_FALSE_POSITIVE_RATES: [f64; 2] = [0.01, 0.05];

/// The 0.975-quantile of the standard normal distribution: two-sided intervals of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// A figure and an interval around it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// A share of prompts with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proportion {
    pub count: usize,
    pub of: usize,
    pub share: f64,
    pub low: f64,
    pub high: f64,
}

/// How well a score tells positive from negative prompts. Intervals are the percentile bootstrap's of 95 %, each class resampled by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Separation {
    /// Area under the ROC curve.
    pub auc: Estimate,
    /// Share of positive prompts above all but 1 % of the negative ones.
    pub tpr_at_1_percent: Estimate,
    /// Share of positive prompts above all but 5 % of the negative ones.
    pub tpr_at_5_percent: Estimate,
}

impl Estimate {
    /// The mean of `values` and their 5th and 95th percentiles: of a control, over its seeds.
    pub fn over_seeds(values: &[f64]) -> Self {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let quantile = |q| crate::tensor::quantile(values, q);
        Self { value: mean, low: quantile(0.05), high: quantile(0.95) }
    }
}

impl Proportion {
    /// With Wilson's score interval, which keeps its coverage near 0 and 1, where shares of interest lie (Wilson 1927;
    /// Brown, Cai and DasGupta 2001). The whole of 0 to 1 where there is nothing to count.
    pub fn new(count: usize, of: usize) -> Self {
        if of == 0 {
            return Self { count, of, share: f64::NAN, low: 0.0, high: 1.0 };
        }
        let (n, p) = (of as f64, count as f64 / of as f64);
        let z2 = Z * Z;
        let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        // At the ends exact by algebra, but not by rounding.
        let low = if count == 0 { 0.0 } else { (middle - half).max(0.0) };
        let high = if count == of { 1.0 } else { (middle + half).min(1.0) };
        Self { count, of, share: p, low, high }
    }

    /// Of a control, over its seeds: all counts together, the mean share and its 5th and 95th percentile.
    pub(super) fn over_seeds(seeds: impl Iterator<Item = Self> + Clone) -> Self {
        let shares: Vec<f64> = seeds.clone().map(|seed| seed.share).collect();
        let Estimate { value, low, high } = Estimate::over_seeds(&shares);
        let (count, of) = seeds.fold((0, 0), |(count, of), seed| (count + seed.count, of + seed.of));
        Self { count, of, share: value, low, high }
    }

    /// How many of `values` are true.
    pub fn of(values: impl IntoIterator<Item = bool>) -> Self {
        let (mut count, mut of) = (0, 0);
        for value in values {
            count += usize::from(value);
            of += 1;
        }
        Self::new(count, of)
    }
}

/// One of `n` for a bootstrap: the high half of a product, even up to 2⁻³², and the same on every machine.
pub(super) fn drawn(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize
}

/// Two classes' scores as counts by rank, from the lowest score up: all that AUC and rates depend on.
struct Ranked {
    /// Rank of every positive score, and of every negative one.
    positive: Vec<u32>,
    negative: Vec<u32>,
    n_ranks: usize,
}

/// Scores of each class at each rank.
struct Counts {
    positive: Vec<u32>,
    negative: Vec<u32>,
}

impl Ranked {
    fn new(positive: &[f64], negative: &[f64]) -> Self {
        let mut sorted: Vec<f64> = positive.iter().chain(negative).copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.dedup_by(|a, b| a == b);
        let ranks = |scores: &[f64]| -> Vec<u32> {
            scores.iter().map(|score| sorted.partition_point(|known| known < score) as u32).collect()
        };
        Self { positive: ranks(positive), negative: ranks(negative), n_ranks: sorted.len() }
    }

    fn counts(&self) -> Counts {
        let count = |ranks: &[u32]| {
            let mut counts = vec![0; self.n_ranks];
            ranks.iter().for_each(|rank| counts[*rank as usize] += 1);
            counts
        };
        Counts { positive: count(&self.positive), negative: count(&self.negative) }
    }

    /// As many of each class, drawn with replacement.
    fn resampled(&self, rng: &mut ChaCha8Rng) -> Counts {
        let mut draw = |ranks: &[u32]| {
            let mut counts = vec![0; self.n_ranks];
            for _ in ranks {
                counts[ranks[drawn(rng, ranks.len())] as usize] += 1;
            }
            counts
        };
        Counts { positive: draw(&self.positive), negative: draw(&self.negative) }
    }
}

impl Counts {
    fn totals(&self) -> (u64, u64) {
        let total = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).sum();
        (total(&self.positive), total(&self.negative))
    }

    /// As [`crate::tensor::auc`], in whole numbers but for the last division.
    fn auc(&self) -> f64 {
        let (positives, negatives) = self.totals();
        let (mut twice_wins, mut below) = (0u64, 0u64);
        for (positive, negative) in self.positive.iter().zip(&self.negative) {
            let (positive, negative) = (u64::from(*positive), u64::from(*negative));
            twice_wins += positive * (2 * below + negative);
            below += negative;
        }
        twice_wins as f64 / (2 * positives * negatives) as f64
    }

    /// The highest share of positives at or above a threshold that no more than `rate` of the negatives reach. Not interpolated: with fewer
    /// than 100 negatives, 1 % of them is none.
    fn true_positive_rate(&self, rate: f64) -> f64 {
        let (positives, negatives) = self.totals();
        // 5 % of 20 is one, whatever the product rounds to.
        let allowed = (rate * negatives as f64 + 1e-9).floor() as u64;
        let (mut hits, mut false_alarms) = (0u64, 0u64);
        for (positive, negative) in self.positive.iter().zip(&self.negative).rev() {
            false_alarms += u64::from(*negative);
            if false_alarms > allowed {
                break;
            }
            hits += u64::from(*positive);
        }
        hits as f64 / positives as f64
    }
}

/// AUC and true-positive rates of `positive` against `negative` scores, with intervals by [`RESAMPLES`] resamples from `seed`. The same on
/// every machine. NaN where a class is empty.
pub fn separation(positive: &[f64], negative: &[f64], seed: u64) -> Separation {
    let ranked = Ranked::new(positive, negative);
    let figures = |counts: &Counts| {
        let [low, high] = LOW_FALSE_POSITIVE_RATES;
        [counts.auc(), counts.true_positive_rate(low), counts.true_positive_rate(high)]
    };
    let found = figures(&ranked.counts());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resamples: [Vec<f64>; 3] = Default::default();
    for _ in 0..RESAMPLES {
        for (all, figure) in resamples.iter_mut().zip(figures(&ranked.resampled(&mut rng))) {
            all.push(figure);
        }
    }
    let estimate = |at: usize| Estimate {
        value: found[at],
        low: crate::tensor::quantile(&resamples[at], 0.025),
        high: crate::tensor::quantile(&resamples[at], 0.975),
    };
    Separation { auc: estimate(0), tpr_at_1_percent: estimate(1), tpr_at_5_percent: estimate(2) }
}

/// The separation of a control, over its seeds: mean and 5th to 95th percentile of each figure.
pub fn separation_over_seeds(scores: &[(Vec<f64>, Vec<f64>)]) -> Separation {
    let counts: Vec<Counts> =
        scores.iter().map(|(positive, negative)| Ranked::new(positive, negative).counts()).collect();
    let over = |figure: &dyn Fn(&Counts) -> f64| Estimate::over_seeds(&counts.iter().map(figure).collect::<Vec<_>>());
    let [low, high] = LOW_FALSE_POSITIVE_RATES;
    Separation {
        auc: over(&Counts::auc),
        tpr_at_1_percent: over(&|counts| counts.true_positive_rate(low)),
        tpr_at_5_percent: over(&|counts| counts.true_positive_rate(high)),
    }
}

/// Corners of the ROC curve from (0, 0) to (1, 1): false-positive and true-positive rate of every threshold at which the curve turns.
pub fn roc(positive: &[f64], negative: &[f64]) -> Vec<[f64; 2]> {
    let counts = Ranked::new(positive, negative).counts();
    let (positives, negatives) = counts.totals();
    let (mut hits, mut false_alarms) = (0u64, 0u64);
    let mut points: Vec<[u64; 2]> = vec![[0, 0]];
    for (positive, negative) in counts.positive.iter().zip(&counts.negative).rev() {
        hits += u64::from(*positive);
        false_alarms += u64::from(*negative);
        let next = [false_alarms, hits];
        // The middle one of three on a line tells nothing.
        if let [.., before, last] = points.as_slice()
            && (last[0] - before[0]) * (next[1] - last[1]) == (last[1] - before[1]) * (next[0] - last[0])
        {
            points.pop();
        }
        points.push(next);
    }
    points.into_iter().map(|[x, y]| [x as f64 / negatives as f64, y as f64 / positives as f64]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn floats(scores: &[u8]) -> Vec<f64> {
        scores.iter().map(|score| f64::from(*score)).collect()
    }

    /// The rate by its definition: every threshold is tried.
    fn brute_force_rate(positive: &[f64], negative: &[f64], rate: f64) -> f64 {
        let share = |scores: &[f64], threshold: f64| {
            scores.iter().filter(|score| **score >= threshold).count() as f64 / scores.len() as f64
        };
        let thresholds = positive.iter().chain(negative).copied().chain([f64::INFINITY]);
        thresholds
            .filter(|threshold| share(negative, *threshold) <= rate + 1e-9)
            .map(|threshold| share(positive, threshold))
            .fold(0.0, f64::max)
    }

    proptest! {
        #[test]
        fn figures_are_those_of_their_definitions(
            positive in prop::collection::vec(0u8..12, 1..40),
            negative in prop::collection::vec(0u8..12, 1..40),
        ) {
            let (positive, negative) = (floats(&positive), floats(&negative));
            let counts = Ranked::new(&positive, &negative).counts();
            prop_assert!((counts.auc() - crate::tensor::auc(&positive, &negative)).abs() < 1e-12);
            for rate in [0.0, 0.01, 0.05, 0.1, 0.5, 1.0] {
                let expected = brute_force_rate(&positive, &negative, rate);
                prop_assert!((counts.true_positive_rate(rate) - expected).abs() < 1e-12, "at {rate}");
            }
            let curve = roc(&positive, &negative);
            prop_assert_eq!((curve[0], curve[curve.len() - 1]), ([0.0, 0.0], [1.0, 1.0]));
            let area: f64 = curve.windows(2).map(|two| (two[1][0] - two[0][0]) * (two[0][1] + two[1][1]) / 2.0).sum();
            prop_assert!((area - counts.auc()).abs() < 1e-12);
        }
    }

    /// Percentiles of resamples that are drawn score by score and judged by the definitions.
    #[test]
    fn intervals_are_those_of_a_plain_bootstrap() {
        let positive: Vec<f64> = (0..40).map(|n| f64::from(n * 7 % 40) / 10.0 + 1.0).collect();
        let negative: Vec<f64> = (0..60).map(|n| f64::from(n * 11 % 60) / 20.0).collect();
        let found = separation(&positive, &negative, 5);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut draw = |scores: &[f64]| -> Vec<f64> {
            let one = |_| scores[((u64::from(rng.next_u32()) * scores.len() as u64) >> 32) as usize];
            (0..scores.len()).map(one).collect()
        };
        let (mut aucs, mut rates) = (Vec::new(), Vec::new());
        for _ in 0..RESAMPLES {
            let (positive, negative) = (draw(&positive), draw(&negative));
            aucs.push(crate::tensor::auc(&positive, &negative));
            rates.push(brute_force_rate(&positive, &negative, 0.05));
        }
        for (found, mut all) in [(found.auc, aucs), (found.tpr_at_5_percent, rates)] {
            all.sort_by(f64::total_cmp);
            let at = |q: f64| crate::tensor::quantile(&all, q);
            assert!((found.low - at(0.025)).abs() < 1e-12 && (found.high - at(0.975)).abs() < 1e-12);
            assert!(found.low <= found.value && found.value <= found.high && found.low < found.high);
        }
        assert_eq!(separation(&positive, &negative, 5), separation(&positive, &negative, 5));
        assert_ne!(separation(&positive, &negative, 5).auc, separation(&positive, &negative, 6).auc);
    }

    /// Wilson's bounds are where the normal test of the share just does not reject.
    #[test]
    fn proportions_have_the_interval_of_the_score_test() {
        for (count, of) in [(0, 10), (1, 10), (5, 10), (39, 40), (200, 200)] {
            let Proportion { share, low, high, .. } = Proportion::new(count, of);
            for bound in [low, high] {
                let at_an_end = (count == 0 && bound == 0.0) || (count == of && bound == 1.0);
                let z = (share - bound).abs() / (bound * (1.0 - bound) / of as f64).sqrt();
                assert!(at_an_end || (z - Z).abs() < 1e-9, "{count} of {of}: {z}");
            }
            assert!(low <= share && share <= high);
        }
        // Brown, Cai and DasGupta 2001: 0 of 10 gives 0 to 0.278.
        assert!((Proportion::new(0, 10).high - 0.2775).abs() < 1e-4);
    }

    #[test]
    fn a_quantile_of_the_normal_distribution() {
        use statrs::distribution::{ContinuousCDF, Normal};
        assert!((Normal::standard().inverse_cdf(0.975) - Z).abs() < 1e-9);
    }
}
