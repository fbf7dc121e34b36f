use super::error::{GuardError, shown};
use super::tensors::{self, TensorData, TensorFile};
use super::validate::check_name;
use super::{MAX_WIDTH, ModelIdentity};
use crate::steering::{ClassMeans, ExtractionMethod, PromptTokens, SteeringVector, VectorQuality};
use crate::tensor::LayerIndex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const FORMAT: &str = "pilotfish-vectors-1";

/// Steering vectors of one model, as `extract` writes them: safetensors with a tensor `NAME.LAYER` each, F32 and one-dimensional, where the means
/// of its classes are known `NAME.LAYER.positive` and `NAME.LAYER.negative`, and metadata that says which model and how.
#[derive(Debug, Clone, PartialEq)]
pub struct VectorFile {
    pub model: ModelIdentity,
    /// Read in the order of their tensors' names.
    pub vectors: Vec<SteeringVector>,
}

/// The metadata's key of what the model's weights are changed by; no tensor is called so, as those have a full stop in their names.
const ADAPTERS: &str = "adapters";

/// What the names of the tensors of a vector's class means end in, the positive class first.
const CLASSES: [&str; 2] = [".positive", ".negative"];

/// The tensors of the class means of the vector in `tensor`, the positive one first.
pub fn class_mean_tensors(tensor: &str) -> [String; 2] {
    CLASSES.map(|class| format!("{tensor}{class}"))
}

/// What the metadata says of a vector, under its tensor's name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    method: ExtractionMethod,
    #[serde(default)]
    tokens: PromptTokens,
    mean_norm: f64,
    n_positive: usize,
    n_negative: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quality: Option<VectorQuality>,
}

impl VectorFile {
    /// The same file for the same vectors, in whatever order.
    ///
    /// # Errors
    /// A name that a guard could not use, two vectors of one name and layer, or a value that is not finite.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GuardError> {
        let mut metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("model".to_owned(), self.model.name.clone()),
            ("architecture".to_owned(), self.model.architecture.clone()),
            ("fingerprint".to_owned(), self.model.fingerprint.to_string()),
        ]);
        if !self.model.adapters.is_empty() {
            let adapters = serde_json::to_string(&self.model.adapters).expect("adapters are JSON");
            metadata.insert(ADAPTERS.to_owned(), adapters);
        }
        let mut tensors = BTreeMap::new();
        for vector in &self.vectors {
            check_name(&vector.name)?;
            let tensor = format!("{}.{}", vector.name, vector.layer);
            if vector.values.is_empty() || vector.values.len() > MAX_WIDTH {
                let found = format!("{} in vector `{tensor}`", vector.values.len());
                return Err(GuardError::value(format!("1 to {MAX_WIDTH} values"), found));
            }
            let means = vector.class_means.iter().flat_map(|means| [&means.positive, &means.negative]);
            if let Some(found) = means.clone().map(Vec::len).find(|length| *length != vector.values.len()) {
                let expected = format!("{} values in the class means of vector `{tensor}`", vector.values.len());
                return Err(GuardError::value(expected, found));
            }
            let mut values = means.chain([&vector.values]).flatten();
            let mut figures = vector.quality.iter().flat_map(VectorQuality::numbers).chain([vector.mean_norm]);
            if !figures.all(f64::is_finite) || values.any(|value| !value.is_finite()) {
                let found = format!("one that is not in vector `{tensor}`");
                return Err(GuardError::value("finite values", found));
            }
            let description = Description {
                method: vector.method,
                tokens: vector.tokens.clone(),
                mean_norm: vector.mean_norm,
                n_positive: vector.n_positive,
                n_negative: vector.n_negative,
                quality: vector.quality.clone(),
            };
            let description = serde_json::to_string(&description).expect("finite numbers are JSON");
            metadata.insert(tensor.clone(), description);
            let data = |values| TensorData { shape: vec![vector.values.len()], values };
            if let Some(means) = &vector.class_means {
                let [positive, negative] = class_mean_tensors(&tensor);
                tensors.insert(positive, data(&means.positive));
                tensors.insert(negative, data(&means.negative));
            }
            let data = data(&vector.values);
            if tensors.insert(tensor.clone(), data).is_some() {
                return Err(GuardError::Duplicate { what: "vector", name: tensor });
            }
        }
        Ok(tensors::to_bytes(&metadata, &tensors))
    }

    /// `file` is what errors call it.
    ///
    /// # Errors
    /// Bytes that are not such a file, a vector that is zero or not finite, or anything the metadata should not say.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, GuardError> {
        let tensors = TensorFile::parse(file, bytes)?;
        let mut described = tensors.described();
        described.format(FORMAT)?;
        let model = ModelIdentity {
            name: described.text("model")?.to_owned(),
            architecture: described.text("architecture")?.to_owned(),
            fingerprint: described.parsed("fingerprint")?,
            adapters: if described.has(ADAPTERS) { described.json(ADAPTERS)? } else { Vec::new() },
        };
        let (class_means, names): (Vec<_>, Vec<_>) =
            tensors.names().into_iter().partition(|tensor| CLASSES.iter().any(|class| tensor.ends_with(class)));
        let mut vectors = Vec::new();
        let mut n_class_means = 0;
        for tensor in names {
            let named = tensor.rsplit_once('.').and_then(|(name, layer)| {
                // No sign and no leading zero: one layer, one name.
                let layer = layer.parse().ok().filter(|parsed: &u32| parsed.to_string() == layer)?;
                check_name(name).ok().map(|()| (name.to_owned(), LayerIndex(layer)))
            });
            let (name, layer) = named.ok_or_else(|| GuardError::Safetensors {
                file: shown(file),
                reason: format!("expected tensors named `NAME.LAYER`, found `{}`", shown(&tensor)),
            })?;
            let Description { method, tokens: prompt_tokens, mean_norm, n_positive, n_negative, quality } =
                described.json(&tensor)?;
            let values = tensors.direction(&tensor)?;
            let means = class_mean_tensors(&tensor);
            let class_means = if means.iter().any(|name| class_means.contains(name)) {
                n_class_means += means.len();
                let [positive, negative] = means.map(|name| tensors.shaped(&name, &[values.len()]));
                Some(ClassMeans { positive: positive?, negative: negative? })
            } else {
                None
            };
            vectors.push(SteeringVector {
                name,
                layer,
                values,
                method,
                tokens: prompt_tokens,
                mean_norm,
                n_positive,
                n_negative,
                class_means,
                quality,
            });
        }
        if n_class_means != class_means.len() {
            let reason = format!("it has {} class means, its vectors have {n_class_means}", class_means.len());
            return Err(GuardError::Safetensors { file: shown(file), reason });
        }
        described.finish()?;
        Ok(Self { model, vectors })
    }
}
