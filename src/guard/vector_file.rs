use super::error::{GuardError, shown};
use super::tensors::{self, TensorData, TensorFile};
use super::validate::check_name;
use super::{MAX_WIDTH, ModelIdentity};
use crate::steering::{ExtractionMethod, PromptTokens, SteeringVector, VectorQuality};
use crate::tensor::LayerIndex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const FORMAT: &str = "pilotfish-vectors-1";

/// Steering vectors of one model, as `extract` writes them: safetensors with a tensor `NAME.LAYER` each, F32 and one-dimensional, and
/// metadata that says which model and how.
#[derive(Debug, Clone, PartialEq)]
pub struct VectorFile {
    pub model: ModelIdentity,
    /// Read in the order of their tensors' names.
    pub vectors: Vec<SteeringVector>,
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
        let mut tensors = BTreeMap::new();
        for vector in &self.vectors {
            check_name(&vector.name)?;
            let tensor = format!("{}.{}", vector.name, vector.layer);
            if vector.values.is_empty() || vector.values.len() > MAX_WIDTH {
                let found = format!("{} in vector `{tensor}`", vector.values.len());
                return Err(GuardError::value(format!("1 to {MAX_WIDTH} values"), found));
            }
            let mut figures = vector.quality.iter().flat_map(VectorQuality::numbers).chain([vector.mean_norm]);
            let finite = figures.all(f64::is_finite) && vector.values.iter().all(|value| value.is_finite());
            if !finite {
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
            let data = TensorData { shape: vec![vector.values.len()], values: &vector.values };
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
        };
        let mut vectors = Vec::new();
        for tensor in tensors.names() {
            let named = tensor.rsplit_once('.').and_then(|(name, layer)| {
                // No sign and no leading zero: one layer, one name.
                let layer = layer.parse().ok().filter(|parsed: &u32| parsed.to_string() == layer)?;
                check_name(name).ok().map(|()| (name.to_owned(), LayerIndex(layer)))
            });
            let (name, layer) = named.ok_or_else(|| GuardError::Safetensors {
                file: shown(file),
                reason: format!("expected tensors named `NAME.LAYER`, found `{}`", shown(&tensor)),
            })?;
            let Description { method, tokens, mean_norm, n_positive, n_negative, quality } = described.json(&tensor)?;
            let values = tensors.direction(&tensor)?;
            vectors.push(SteeringVector {
                name,
                layer,
                values,
                method,
                tokens,
                mean_norm,
                n_positive,
                n_negative,
                quality,
            });
        }
        described.finish()?;
        Ok(Self { model, vectors })
    }
}
