use super::{ClassMeans, ExtractionMethod, PromptTokens, SteeringError, SteeringVector};
use crate::tensor::{LayerIndex, Residual, norm};

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
    pub class_means: ClassMeans,
}

impl Extracted {
    /// The steering vector `name` at `layer`, the layer whose residual the rows were, made from those `tokens` of prompts.
    pub fn named(self, name: impl Into<String>, layer: LayerIndex, tokens: PromptTokens) -> SteeringVector {
        let Self { values, method, mean_norm, n_positive, n_negative, class_means } = self;
        let class_means = Some(class_means);
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
        }
    }
}

/// `v = mean(x | +) − mean(x | −)`, `[width]`, from `positive` and `negative`, `[n, width]` each: residuals of one layer, one row
/// a prompt, at its last token (the difference in means of arXiv 2503.04429). The classes may differ in size. Sums are in `f64`; the
/// result is rounded once.
///
/// The caller leaves out the first position of a sequence, whose activations would swamp every other row.
///
/// # Errors
/// If a class is empty, the widths differ, a value is not finite, or the means are equal.
pub fn difference_of_means(positive: Residual, negative: Residual) -> Result<Extracted, SteeringError> {
    let (positive_mean, negative_mean) = class_means(positive, negative)?;
    let difference = positive_mean.iter().zip(&negative_mean).map(|(positive, negative)| positive - negative);
    extracted(ExtractionMethod::DifferenceOfMeans, difference, positive, negative)
}

/// Rounds `values` and adds what is to be known of the classes.
pub(super) fn extracted(
    method: ExtractionMethod,
    values: impl Iterator<Item = f64>,
    positive: Residual,
    negative: Residual,
) -> Result<Extracted, SteeringError> {
    let rounded = |(index, value): (usize, f64)| {
        let rounded = value as f32;
        if rounded.is_finite() { Ok(rounded) } else { Err(SteeringError::Overflow { index, value }) }
    };
    let values = values.enumerate().map(rounded).collect::<Result<Vec<_>, _>>()?;
    if values.iter().all(|value| *value == 0.0) {
        return Err(SteeringError::ZeroDirection);
    }
    let (n_positive, n_negative) = (positive.n_rows(), negative.n_rows());
    let norms: f64 = positive.rows().chain(negative.rows()).map(norm).sum();
    let mean_norm = norms / (n_positive + n_negative) as f64;
    let (positive, negative) = class_means(positive, negative)?;
    // A mean of finite `f32`s is one.
    let rounded = |mean: Vec<f64>| mean.into_iter().map(|value| value as f32).collect();
    let class_means = ClassMeans { positive: rounded(positive), negative: rounded(negative) };
    Ok(Extracted { values, method, mean_norm, n_positive, n_negative, class_means })
}

/// Both classes' means, `[width]`, once the rows are known to be comparable.
pub(super) fn class_means(positive: Residual, negative: Residual) -> Result<(Vec<f64>, Vec<f64>), SteeringError> {
    if positive.width() != negative.width() {
        return Err(SteeringError::ClassWidths { positive: positive.width(), negative: negative.width() });
    }
    Ok((class_mean("positive", positive)?, class_mean("negative", negative)?))
}

fn class_mean(class: &'static str, rows: Residual) -> Result<Vec<f64>, SteeringError> {
    if rows.n_rows() == 0 {
        return Err(SteeringError::EmptyClass { class });
    }
    let mut mean = vec![0.0f64; rows.width()];
    for (row, values) in rows.rows().enumerate() {
        for (index, (sum, &value)) in mean.iter_mut().zip(values).enumerate() {
            if !value.is_finite() {
                return Err(SteeringError::NonFiniteRow { class, row, index, value });
            }
            *sum += f64::from(value);
        }
    }
    for sum in &mut mean {
        *sum /= rows.n_rows() as f64;
    }
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(values: &[f32], width: usize) -> Residual<'_> {
        Residual::new(values, width).unwrap()
    }

    #[test]
    fn a_known_difference() {
        let extracted = difference_of_means(rows(&[3.0, 4.0, 0.0, 0.0, 6.0, 8.0], 2), rows(&[1.0, 0.0], 2)).unwrap();
        assert_eq!(extracted.values, [2.0, 4.0]);
        assert_eq!(extracted.mean_norm, (5.0 + 0.0 + 10.0 + 1.0) / 4.0);
        assert_eq!(extracted.class_means, ClassMeans { positive: vec![3.0, 4.0], negative: vec![1.0, 0.0] });
        let vector = extracted.named("harm", LayerIndex(24), PromptTokens::Last);
        assert_eq!((vector.n_positive, vector.n_negative, vector.layer), (3, 1, LayerIndex(24)));
        assert_eq!(vector.method, ExtractionMethod::DifferenceOfMeans);
    }

    #[test]
    fn a_small_difference_survives_a_large_offset() {
        // In f32 the running sum of 4096 rows near 1e6 would lose the 0.5 altogether.
        let positive = vec![1e6f32 + 0.5; 4096];
        let negative = vec![1e6f32; 4096];
        assert_eq!(difference_of_means(rows(&positive, 1), rows(&negative, 1)).unwrap().values, [0.5]);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let cases: [(&[f32], &[f32], usize, &str); 6] = [
            (&[], &[1.0], 1, "the positive class has no rows"),
            (&[1.0], &[], 1, "the negative class has no rows"),
            (&[1.0], &[1.0, 2.0], 2, "rows of the positive class have width 1, those of the negative class 2"),
            (&[1.0], &[2.0, f32::NAN], 1, "row 1 of the negative class has a non-finite value (NaN) at index 0"),
            (&[1.0, 3.0], &[2.0], 1, "the two classes have the same mean: there is no direction between them"),
            (&[f32::MAX], &[f32::MIN], 1, "the direction does not fit in `f32`: index 0 is 6"),
        ];
        for (positive, negative, negative_width, expected) in cases {
            let error = difference_of_means(rows(positive, 1), rows(negative, negative_width)).unwrap_err();
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
            let plain = difference_of_means(rows(&shifted(&positive, 0), 1), rows(&shifted(&negative, 0), 1));
            let moved = difference_of_means(rows(&shifted(&positive, shift), 1), rows(&shifted(&negative, shift), 1));
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
