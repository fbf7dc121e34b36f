/// Mean and sample standard deviation (n − 1) of `values`, in `f64`; `None` for fewer than two.
pub fn mean_and_deviation(values: &[f64]) -> Option<(f64, f64)> {
    if values.len() < 2 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    Some((mean, (squares / (values.len() - 1) as f64).sqrt()))
}

/// Area under the ROC curve: the probability that a random positive scores above a random negative, ties counting half
/// (the Mann–Whitney statistic). NaN where a class is empty.
pub fn auc(positive: &[f64], negative: &[f64]) -> f64 {
    let mut scores: Vec<(f64, bool)> =
        positive.iter().map(|score| (*score, true)).chain(negative.iter().map(|score| (*score, false))).collect();
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut wins, mut below) = (0.0, 0usize);
    for tied in scores.chunk_by(|a, b| a.0 == b.0) {
        let positives = tied.iter().filter(|(_, positive)| *positive).count();
        let negatives = tied.len() - positives;
        wins += positives as f64 * (below as f64 + negatives as f64 / 2.0);
        below += negatives;
    }
    wins / (positive.len() as f64 * negative.len() as f64)
}

/// The `q`-quantile of `values`, interpolated between neighbours (type 7, as numpy's default). NaN where there are none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Logarithms of the softmax of `logits`, in `f64`.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let highest = f64::from(highest);
    let total: f64 = logits.iter().map(|logit| (f64::from(*logit) - highest).exp()).sum();
    let shift = highest + total.ln();
    logits.iter().map(|logit| f64::from(*logit) - shift).collect()
}

/// Kullback–Leibler divergence `KL(p ‖ q) = Σ p ln(p / q)` of the softmax of two rows of logits, `[n]` each, in nats.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    debug_assert_eq!(p.len(), q.len());
    let (p, q) = (log_softmax(p), log_softmax(q));
    // A sum of rounded terms may fall below zero by their rounding.
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn deviation_is_the_sample_one() {
        assert_eq!(mean_and_deviation(&[1.0, 2.0, 3.0, 4.0]), Some((2.5, (5.0f64 / 3.0).sqrt())));
        assert_eq!(mean_and_deviation(&[1.0]), None);
    }

    #[test]
    fn known_values() {
        assert_eq!(auc(&[2.0, 3.0], &[0.0, 1.0]), 1.0);
        assert_eq!(auc(&[0.0], &[1.0]), 0.0);
        assert_eq!(auc(&[1.0, 1.0], &[1.0]), 0.5);
        assert!(auc(&[], &[1.0]).is_nan());
        assert_eq!(quantile(&[4.0, 1.0, 3.0, 2.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0, 2.0], 1.0), 2.0);
    }

    #[test]
    fn divergence_of_known_distributions() {
        let logits = |shares: [f64; 2]| shares.map(|share| share.ln() as f32);
        // ½ ln(½ / ¼) + ½ ln(½ / ¾)
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((kl_divergence(&logits([0.5, 0.5]), &logits([0.25, 0.75])) - expected).abs() < 1e-6);
        // Softmax does not see a common shift, however large.
        assert!(kl_divergence(&[1.0, 2.0, 3.0], &[1001.0, 1002.0, 1003.0]) < 1e-12);
        let total: f64 = log_softmax(&[-700.0, 0.0, 88.0]).iter().map(|log| log.exp()).sum();
        assert!((total - 1.0).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn auc_counts_pairs(
            positive in proptest::collection::vec(0u8..6, 1..30),
            negative in proptest::collection::vec(0u8..6, 1..30),
        ) {
            let float = |scores: &[u8]| -> Vec<f64> { scores.iter().map(|score| f64::from(*score)).collect() };
            let mut wins = 0.0;
            for p in &positive {
                for n in &negative {
                    wins += match p.cmp(n) {
                        std::cmp::Ordering::Greater => 1.0,
                        std::cmp::Ordering::Equal => 0.5,
                        std::cmp::Ordering::Less => 0.0,
                    };
                }
            }
            let expected = wins / (positive.len() * negative.len()) as f64;
            prop_assert!((auc(&float(&positive), &float(&negative)) - expected).abs() < 1e-12);
        }
    }
}
