//! safetensors: F32 tensors by name, with string metadata, read strictly and written so that equal content is equal bytes.

use super::error::{GuardError, listed, shown};
use super::{MAX_TENSOR_BYTES, MAX_WIDTH};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Bytes of the length that a safetensors file starts with.
const LENGTH_BYTES: usize = 8;
/// Bytes a header may have: the crate's own limit is 100 MB, and a guard's header has a line a tensor.
const MAX_HEADER_BYTES: usize = 16 << 20;
const F32_BYTES: usize = size_of::<f32>();

/// A parsed safetensors file.
pub(super) struct TensorFile<'a> {
    file: String,
    header: Metadata,
    data: &'a [u8],
}

impl<'a> TensorFile<'a> {
    /// `file` is what errors call it.
    ///
    /// The header's own consistency is the safetensors crate's to check; how it fits the bytes is checked here, because the crate's
    /// sum of sizes overflows for a header that claims nearly 2⁶⁴ bytes.
    pub(super) fn parse(file: &str, bytes: &'a [u8]) -> Result<Self, GuardError> {
        let problem = |reason: String| GuardError::Safetensors { file: shown(file), reason: shown(&reason) };
        if bytes.len() as u64 > MAX_TENSOR_BYTES {
            return Err(GuardError::TooLarge { file: shown(file), limit: MAX_TENSOR_BYTES });
        }
        let (length, rest) = bytes
            .split_first_chunk::<LENGTH_BYTES>()
            .ok_or_else(|| problem(format!("it has {} bytes, too few for a header", bytes.len())))?;
        let length = u64::from_le_bytes(*length);
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_HEADER_BYTES)
            .ok_or_else(|| problem(format!("its header claims {length} bytes, more than {MAX_HEADER_BYTES}")))?;
        let (header, data) = rest
            .split_at_checked(length)
            .ok_or_else(|| problem(format!("its header claims {length} bytes, {} are left", rest.len())))?;
        let header: Metadata =
            serde_json::from_slice(header).map_err(|error| problem(format!("its header: {error}")))?;
        if header.data_len() != data.len() {
            return Err(problem(format!("its tensors need {} bytes, {} are there", header.data_len(), data.len())));
        }
        Ok(Self { file: shown(file), header, data })
    }

    /// Names of tensors, in order.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        names
    }

    /// `[n]`: finite, and not zero everywhere.
    pub(super) fn direction(&self, tensor: &str) -> Result<Vec<f32>, GuardError> {
        let values = self.values(tensor, |shape| shape.len() == 1, "one-dimensional")?;
        if values.is_empty() || values.len() > MAX_WIDTH {
            let expected = format!("1 to {MAX_WIDTH} values");
            return Err(self.shape_error(tensor, expected, format!("{} values", values.len())));
        }
        if values.iter().all(|value| *value == 0.0) {
            return Err(GuardError::ZeroVector { file: self.file.clone(), tensor: shown(tensor) });
        }
        Ok(values)
    }

    /// A finite tensor of `shape`.
    pub(super) fn shaped(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>, GuardError> {
        self.values(tensor, |found| found == shape, &format!("of shape {shape:?}"))
    }

    /// Rows and columns of a matrix.
    pub(super) fn matrix_shape(&self, tensor: &str) -> Result<(usize, usize), GuardError> {
        let shape = &self.info(tensor)?.shape;
        let &[rows, columns] = shape.as_slice() else {
            return Err(self.shape_error(tensor, "a matrix".to_owned(), format!("of shape {shape:?}")));
        };
        Ok((rows, columns))
    }

    fn values(&self, tensor: &str, fits: impl Fn(&[usize]) -> bool, wanted: &str) -> Result<Vec<f32>, GuardError> {
        let info = self.info(tensor)?;
        if info.dtype != Dtype::F32 || !fits(&info.shape) {
            let found = format!("{} of shape {:?}", info.dtype, info.shape);
            return Err(self.shape_error(tensor, format!("F32 {wanted}"), found));
        }
        let (start, end) = info.data_offsets;
        let (values, _) = self.data[start..end].as_chunks::<F32_BYTES>();
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(GuardError::NonFinite {
                file: self.file.clone(),
                tensor: shown(tensor),
                index,
                value: values[index],
            }),
            None => Ok(values),
        }
    }

    fn info(&self, tensor: &str) -> Result<&safetensors::tensor::TensorInfo, GuardError> {
        self.header.info(tensor).ok_or_else(|| GuardError::NoTensor {
            file: self.file.clone(),
            tensor: shown(tensor),
            known: listed(self.names().iter()),
        })
    }

    fn shape_error(&self, tensor: &str, expected: String, found: String) -> GuardError {
        GuardError::TensorShape { file: self.file.clone(), tensor: shown(tensor), expected, found: shown(&found) }
    }

    /// The metadata, of which every key has to be taken: whoever leaves one asks for [`Described::finish`]'s error.
    pub(super) fn described(&self) -> Described<'_> {
        let metadata = self.header.metadata().iter().flatten();
        Described { file: &self.file, left: metadata.map(|(key, value)| (key.as_str(), value.as_str())).collect() }
    }
}

/// Metadata of a self-describing file, as far as it has not been read.
pub(super) struct Described<'a> {
    file: &'a str,
    left: BTreeMap<&'a str, &'a str>,
}

impl<'a> Described<'a> {
    pub(super) fn text(&mut self, key: &str) -> Result<&'a str, GuardError> {
        self.left.remove(key).ok_or_else(|| self.problem(key, "missing".to_owned()))
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.left.contains_key(key)
    }

    /// Checks `format`, the first thing to be read.
    pub(super) fn format(&mut self, expected: &str) -> Result<(), GuardError> {
        let found = self.text("format")?;
        if found == expected {
            return Ok(());
        }
        Err(self.problem("format", format!("expected `{expected}`, found `{found}`")))
    }

    pub(super) fn parsed<T: std::str::FromStr<Err: ToString>>(&mut self, key: &str) -> Result<T, GuardError> {
        self.text(key)?.parse().map_err(|error: T::Err| self.problem(key, error.to_string()))
    }

    pub(super) fn json<T: DeserializeOwned>(&mut self, key: &str) -> Result<T, GuardError> {
        serde_json::from_str(self.text(key)?).map_err(|error| self.problem(key, error.to_string()))
    }

    /// The keys that are left.
    pub(super) fn keys(&self) -> Vec<String> {
        self.left.keys().map(|key| (*key).to_owned()).collect()
    }

    pub(super) fn finish(&self) -> Result<(), GuardError> {
        match self.left.keys().next() {
            Some(key) => Err(self.problem(key, "unknown".to_owned())),
            None => Ok(()),
        }
    }

    pub(super) fn problem(&self, key: &str, reason: String) -> GuardError {
        GuardError::Metadata { file: self.file.to_owned(), key: shown(key), reason: shown(&reason) }
    }
}

/// A tensor to write.
pub(super) struct TensorData<'a> {
    pub shape: Vec<usize>,
    pub values: &'a [f32],
}

/// A safetensors file. Unlike what the safetensors crate writes, it is the same for the same content: there metadata keeps the order of
/// a hash map.
pub(super) fn to_bytes(metadata: &BTreeMap<String, String>, tensors: &BTreeMap<String, TensorData<'_>>) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Entry<'a> {
        Metadata(&'a BTreeMap<String, String>),
        Tensor { dtype: &'static str, shape: &'a [usize], data_offsets: [usize; 2] },
    }
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert("__metadata__", Entry::Metadata(metadata));
    }
    let mut end = 0;
    for (name, tensor) in tensors {
        let start = end;
        end += size_of_val(tensor.values);
        header.insert(name, Entry::Tensor { dtype: "F32", shape: &tensor.shape, data_offsets: [start, end] });
    }
    let mut header = serde_json::to_vec(&header).expect("a map with string keys is JSON");
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + header.len() + end);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    for tensor in tensors.values() {
        bytes.extend(tensor.values.iter().flat_map(|value| value.to_le_bytes()));
    }
    bytes
}
