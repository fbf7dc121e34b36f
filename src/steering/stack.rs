use super::{ClassMeans, SteeringVector};
use crate::tensor::{LayerIndex, LayerStack, norm};

/// The vectors of the layers of `stack` as one over their residuals beside each other, which is what a mapping of several layers carries: the
/// vector itself where the stack is one layer. Its layer is the last, its mean norm that of the rows beside each other, as far as the layers'
/// own tell; its quality is not known. `None` unless there is one of each layer, all of the name, method and tokens of the first.
pub fn stacked(vectors: &[SteeringVector], stack: &LayerStack) -> Option<SteeringVector> {
    let of = |layer: &LayerIndex| vectors.iter().find(|vector| vector.layer == *layer);
    let parts: Vec<&SteeringVector> = stack.layers().iter().map(of).collect::<Option<_>>()?;
    let last = *parts.last()?;
    let alike =
        |part: &&SteeringVector| (&part.name, part.method, &part.tokens) == (&last.name, last.method, &last.tokens);
    if !parts.iter().all(alike) {
        return None;
    }
    if parts.len() == 1 {
        return Some(last.clone());
    }
    let norms: Vec<f32> = parts.iter().map(|part| part.mean_norm as f32).collect();
    let values = parts.iter().flat_map(|part| &part.values).copied().collect();
    let means: Option<Vec<&ClassMeans>> = parts.iter().map(|part| part.class_means.as_ref()).collect();
    let class_means = means.map(|means| ClassMeans {
        positive: means.iter().flat_map(|means| &means.positive).copied().collect(),
        negative: means.iter().flat_map(|means| &means.negative).copied().collect(),
    });
    Some(SteeringVector { values, mean_norm: norm(&norms), class_means, quality: None, ..last.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::{ContrastSet, ExtractionMethod, PromptTokens, difference_of_means};
    use crate::tensor::Residual;

    #[test]
    fn vectors_beside_each_other_are_the_vector_of_rows_beside_each_other() {
        let (positive, negative) = ([[1.0, 2.0, 5.0], [3.0, 0.0, 1.0]], [[0.0, 1.0, 2.0], [1.0, 1.0, 8.0]]);
        let vector = |columns: std::ops::Range<usize>, layer| {
            let take =
                |rows: &[[f32; 3]]| rows.iter().flat_map(|row| row[columns.clone()].to_vec()).collect::<Vec<_>>();
            let (positive, negative) = (take(&positive), take(&negative));
            let rows = |values| Residual::new(values, columns.len()).unwrap();
            let found = difference_of_means(&[ContrastSet::new(rows(&positive), rows(&negative))]).unwrap();
            found.named("v", LayerIndex(layer), PromptTokens::Last)
        };
        let vectors = [vector(2..3, 9), vector(0..2, 4)];
        let found = stacked(&vectors, &"4+9".parse().unwrap()).unwrap();
        assert_eq!(found.values, vector(0..3, 9).values);
        assert_eq!(found.class_means, vector(0..3, 9).class_means);
        assert_eq!(stacked(&vectors, &LayerIndex(4).into()), Some(vectors[1].clone()));
        assert_eq!(stacked(&vectors, &"4+5".parse().unwrap()), None);
        let mut other = vectors.clone();
        other[0].method = ExtractionMethod::Imported;
        assert_eq!(stacked(&other, &"4+9".parse().unwrap()), None);
    }
}
