use super::contrast::Checked;
use super::{ClassMeans, ContrastSet, ExtractionMethod, PromptTokens, SteeringError, SteeringVector};
use crate::tensor::LayerIndex;

/// A direction before it has a name and a place.
#[derive(Debug, Clone, PartialEq)]
pub struct Extracted {
    /// `[width]`, not normalised.
    pub values: Vec<f32>,
    pub method: ExtractionMethod,
    /// Mean L2 norm of the rows of both classes: what the direction's own norm is to be compared with.
    pub mean_norm: f64,
    pub n_positive: usize,
    pub n_negative: usize,
    /// Where the vector is their difference.
    pub class_means: Option<ClassMeans>,
}

impl Extracted {
    /// The steering vector `name` at `layer`, the layer whose residual the rows were, made from those `tokens` of prompts.
    pub fn named(self, name: impl Into<String>, layer: LayerIndex, tokens: PromptTokens) -> SteeringVector {
        let Self { values, method, mean_norm, n_positive, n_negative, class_means } = self;
        SteeringVector {
            name: name.into(),
            layer,
            values,
            method,
            tokens,
            mean_norm,
            n_positive,
            n_negative,
            class_means,
            quality: None,
        }
    }
}

/// `v = Σ ω (mean(x | +) − mean(x | −))` over the sets, `[width]`: residuals of one layer, one row a prompt, at its last token (the difference
/// in means of arXiv 2503.04429, there with one set). Classes may differ in size. Sums are in `f64`; the result is rounded once.
///
/// The caller leaves out the first position of a sequence, whose activations would swamp every other row.
///
/// # Errors
/// If there is no set, a class is empty, widths differ, a value is not finite, a weight is not above 0, or the means are equal.
pub fn difference_of_means(sets: &[ContrastSet<'_>]) -> Result<Extracted, SteeringError> {
    let checked = Checked::new(sets)?;
    checked.extracted(ExtractionMethod::DifferenceOfMeans, checked.mean_difference().into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Residual;
    use proptest::prelude::*;

    fn difference(positive: Residual, negative: Residual) -> Result<Extracted, SteeringError> {
        difference_of_means(&[ContrastSet::new(positive, negative)])
    }

    fn rows(values: &[f32], width: usize) -> Residual<'_> {
        Residual::new(values, width).unwrap()
    }

    #[test]
    fn a_known_difference() {
        let extracted = difference(rows(&[3.0, 4.0, 0.0, 0.0, 6.0, 8.0], 2), rows(&[1.0, 0.0], 2)).unwrap();
        assert_eq!(extracted.values, [2.0, 4.0]);
        assert_eq!(extracted.mean_norm, (5.0 + 0.0 + 10.0 + 1.0) / 4.0);
        assert_eq!(extracted.class_means, Some(ClassMeans { positive: vec![3.0, 4.0], negative: vec![1.0, 0.0] }));
        let vector = extracted.named("harm", LayerIndex(24), PromptTokens::Last);
        assert_eq!((vector.n_positive, vector.n_negative, vector.layer), (3, 1, LayerIndex(24)));
        assert_eq!(vector.method, ExtractionMethod::DifferenceOfMeans);
    }

    #[test]
    fn sets_have_the_say_of_their_weight_whatever_their_size() {
        let large = ContrastSet::new(rows(&[2.0; 100], 1), rows(&[0.0; 50], 1));
        let small = ContrastSet::new(rows(&[8.0], 1), rows(&[0.0], 1));
        assert_eq!(difference_of_means(&[large, small]).unwrap().values, [5.0]);
        let heavier = ContrastSet { weight: 2.0, ..small };
        assert_eq!(difference_of_means(&[large, heavier]).unwrap().values, [6.0]);
        let both = difference_of_means(&[large, small]).unwrap();
        assert_eq!((both.n_positive, both.n_negative), (101, 51));
        assert_eq!(both.class_means, Some(ClassMeans { positive: vec![5.0], negative: vec![0.0] }));
        assert!((both.mean_norm - (200.0 / 150.0 + 4.0) / 2.0).abs() < 1e-12);
        assert_eq!(difference_of_means(&[]).unwrap_err(), SteeringError::NoSets);
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = difference_of_means(&[large, ContrastSet { weight, ..small }]).unwrap_err().to_string();
            assert!(error.contains("weight"), "{error}");
        }
    }

    #[test]
    fn a_small_difference_survives_a_large_offset() {
        // In f32 the running sum of 4096 rows near 1e6 would lose the 0.5 altogether.
        let positive = vec![1e6f32 + 0.5; 4096];
        let negative = vec![1e6f32; 4096];
        assert_eq!(difference(rows(&positive, 1), rows(&negative, 1)).unwrap().values, [0.5]);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let cases: [(&[f32], &[f32], usize, &str); 6] = [
            (&[], &[1.0], 1, "the positive class has no rows"),
            (&[1.0], &[], 1, "the negative class has no rows"),
            (&[1.0], &[1.0, 2.0], 2, "rows of the negative class have width 2, expected 1"),
            (&[1.0], &[2.0, f32::NAN], 1, "row 1 of the negative class has a non-finite value (NaN) at index 0"),
            (&[1.0, 3.0], &[2.0], 1, "the two classes have the same mean: there is no direction between them"),
            (&[f32::MAX], &[f32::MIN], 1, "the direction does not fit in `f32`: index 0 is 6"),
        ];
        for (positive, negative, negative_width, expected) in cases {
            let error = difference(rows(positive, 1), rows(negative, negative_width)).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_shift_of_both_classes_changes_nothing(
            positive in proptest::collection::vec(-1024i16..1024, 1..40),
            negative in proptest::collection::vec(-1024i16..1024, 1..40),
            shift in -1024i16..1024,
        ) {
            // Whole numbers, so that the shifted rows are exact.
            let shifted = |class: &[i16], by: i16| class.iter().map(|x| f32::from(*x) + f32::from(by)).collect::<Vec<_>>();
            let plain = difference(rows(&shifted(&positive, 0), 1), rows(&shifted(&negative, 0), 1));
            let moved = difference(rows(&shifted(&positive, shift), 1), rows(&shifted(&negative, shift), 1));
            match (plain, moved) {
                (Ok(plain), Ok(moved)) => prop_assert!((plain.values[0] - moved.values[0]).abs() <= 1e-3),
                // Means that agree up to rounding may cancel exactly on one side alone.
                (plain, moved) => {
                    for extracted in [plain, moved].into_iter().flatten() {
                        prop_assert!(extracted.values[0].abs() < 1e-9);
                    }
                }
            }
        }
    }
}
