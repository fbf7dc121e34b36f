//! GGUF, as far as control vectors need it: little-endian, version 2 or 3, F32 tensors of one dimension.
//!
//! Everything here is untrusted. Counts and lengths from the file are checked against the bytes that are there before anything
//! is reserved or skipped, so memory and time stay proportional to the file. Where llama.cpp's reader (`ggml/src/gguf.cpp`)
//! refuses, so does this one: repeated keys and names, nested arrays, tensors that are not laid out one after another, a last
//! tensor without its padding. Like it, this one ignores bytes past the last tensor.

use super::SteeringError;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const MAGIC: [u8; 4] = *b"GGUF";
pub(super) const VERSION: u32 = 3;
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
pub(super) const TYPE_UINT32: u32 = 4;
pub(super) const TYPE_STRING: u32 = 8;
pub(super) const TENSOR_F32: u32 = 0;
const TYPE_ARRAY: u32 = 9;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Longest key of the GGUF specification.
const MAX_KEY: u64 = 65_535;
/// `GGML_MAX_NAME` less its terminator.
const MAX_TENSOR_NAME: u64 = 63;
/// `GGML_MAX_DIMS`.
const MAX_DIMENSIONS: u32 = 4;

pub(super) struct Gguf<'a> {
    /// Values by key; those that are not a `Text` or a `Uint32` are skipped over.
    pub values: BTreeMap<&'a str, Value<'a>>,
    pub tensors: Vec<Tensor<'a>>,
}

#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Text { bytes: &'a [u8], offset: usize },
    Uint32 { value: u32, offset: usize },
    Other { offset: usize },
}

pub(super) struct Tensor<'a> {
    pub name: &'a str,
    /// Where the tensor is described.
    pub offset: usize,
    pub values: Vec<f32>,
}

struct TensorInfo<'a> {
    name: &'a str,
    offset: usize,
    n_bytes: u64,
    data_offset: u64,
}

pub(super) fn parse(bytes: &[u8]) -> Result<Gguf<'_>, SteeringError> {
    let mut cursor = Cursor { bytes, offset: 0 };
    let found = cursor.array::<4>("the magic")?;
    if found != MAGIC {
        return Err(SteeringError::Magic { expected: MAGIC, found });
    }
    let version = cursor.uint32("the version")?;
    if !(2..=VERSION).contains(&version) {
        return Err(SteeringError::Version { found: version });
    }
    let n_tensors = cursor.uint64("the number of tensors")?;
    let n_keys = cursor.uint64("the number of keys")?;
    let mut values = BTreeMap::new();
    for _ in 0..n_keys {
        read_key(&mut cursor, &mut values)?;
    }
    let alignment = alignment(&values)?;
    let mut infos = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..n_tensors {
        let info = read_tensor_info(&mut cursor)?;
        if !names.insert(info.name) {
            return Err(tensor_error(info.name, info.offset, "occurs twice"));
        }
        infos.push(info);
    }
    let mut tensors = Vec::with_capacity(infos.len());
    if n_tensors > 0 {
        cursor.skip(padding(cursor.offset as u64, alignment), || "the padding before the tensor data".to_owned())?;
    }
    let data_start = cursor.offset;
    for TensorInfo { name, offset, n_bytes, data_offset } in infos {
        let expected = (cursor.offset - data_start) as u64;
        if data_offset != expected {
            return Err(tensor_error(name, offset, format!("data at offset {data_offset}, expected {expected}")));
        }
        let data = cursor.take(n_bytes, || format!("the data of tensor `{}`", shown(name)))?;
        cursor.skip(padding(n_bytes, alignment), || format!("the padding of tensor `{}`", shown(name)))?;
        let (values, _) = data.as_chunks::<4>();
        let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        tensors.push(Tensor { name, offset, values });
    }
    Ok(Gguf { values, tensors })
}

/// Bytes that bring `length` to a multiple of `alignment`.
pub(super) fn padding(length: u64, alignment: u64) -> u64 {
    (alignment - length % alignment) % alignment
}

fn read_key<'a>(cursor: &mut Cursor<'a>, values: &mut BTreeMap<&'a str, Value<'a>>) -> Result<(), SteeringError> {
    let start = cursor.offset;
    let key = cursor.name("key", MAX_KEY, key_error)?;
    let what = || format!("the value of key `{}`", shown(key));
    let type_id = cursor.uint32_with(what)?;
    let offset = cursor.offset;
    let value = match type_id {
        TYPE_STRING => Value::Text { bytes: cursor.text(what)?, offset },
        TYPE_UINT32 => Value::Uint32 { value: cursor.uint32_with(what)?, offset },
        TYPE_ARRAY => {
            skip_array(cursor, key, start)?;
            Value::Other { offset }
        }
        _ => {
            let size =
                scalar_size(type_id).ok_or_else(|| key_error(key, start, format!("unknown value type {type_id}")))?;
            cursor.skip(size, what)?;
            Value::Other { offset }
        }
    };
    if values.insert(key, value).is_some() {
        return Err(key_error(key, start, "occurs twice"));
    }
    Ok(())
}

fn skip_array(cursor: &mut Cursor, key: &str, start: usize) -> Result<(), SteeringError> {
    let what = || format!("the array of key `{}`", shown(key));
    let type_id = cursor.uint32_with(what)?;
    let length = cursor.uint64_with(what)?;
    if type_id == TYPE_STRING {
        for _ in 0..length {
            cursor.text(what)?;
        }
        return Ok(());
    }
    let size = scalar_size(type_id)
        .ok_or_else(|| key_error(key, start, format!("an array of unsupported value type {type_id}")))?;
    // A length past u64 is past the end of any file as well.
    cursor.skip(length.saturating_mul(size), what)
}

/// Size in bytes of a value of fixed size; `None` for strings, arrays and unknown types.
fn scalar_size(type_id: u32) -> Option<u64> {
    match type_id {
        // uint8, int8, bool
        0 | 1 | 7 => Some(1),
        // uint16, int16
        2 | 3 => Some(2),
        // uint32, int32, float32
        TYPE_UINT32 | 5 | 6 => Some(4),
        // uint64, int64, float64
        10..=12 => Some(8),
        _ => None,
    }
}

fn alignment(values: &BTreeMap<&str, Value>) -> Result<u64, SteeringError> {
    match values.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Uint32 { value, .. }) if value.is_power_of_two() => Ok(u64::from(*value)),
        Some(Value::Uint32 { value, offset }) => {
            Err(key_error(ALIGNMENT_KEY, *offset, format!("{value} is not a power of two")))
        }
        Some(Value::Text { offset, .. } | Value::Other { offset }) => {
            Err(key_error(ALIGNMENT_KEY, *offset, "not a uint32"))
        }
    }
}

fn read_tensor_info<'a>(cursor: &mut Cursor<'a>) -> Result<TensorInfo<'a>, SteeringError> {
    let offset = cursor.offset;
    let name = cursor.name("tensor", MAX_TENSOR_NAME, tensor_error)?;
    let what = || format!("the description of tensor `{}`", shown(name));
    let n_dimensions = cursor.uint32_with(what)?;
    if !(1..=MAX_DIMENSIONS).contains(&n_dimensions) {
        return Err(tensor_error(name, offset, format!("has {n_dimensions} dimensions, expected 1")));
    }
    let width = cursor.uint64_with(what)?;
    for _ in 1..n_dimensions {
        // ggml does not count trailing dimensions of size 1.
        let size = cursor.uint64_with(what)?;
        if size != 1 {
            return Err(tensor_error(
                name,
                offset,
                format!("has a further dimension of {size}, expected one dimension"),
            ));
        }
    }
    let type_id = cursor.uint32_with(what)?;
    if type_id != TENSOR_F32 {
        return Err(tensor_error(name, offset, format!("has ggml type {type_id}, expected F32 ({TENSOR_F32})")));
    }
    let n_bytes = width
        .checked_mul(size_of::<f32>() as u64)
        .ok_or_else(|| tensor_error(name, offset, format!("has an impossible width of {width}")))?;
    let data_offset = cursor.uint64_with(what)?;
    Ok(TensorInfo { name, offset, n_bytes, data_offset })
}

pub(super) fn key_error(key: &str, offset: usize, reason: impl Into<String>) -> SteeringError {
    SteeringError::Key { key: shown(key), offset, reason: reason.into() }
}

pub(super) fn tensor_error(tensor: &str, offset: usize, reason: impl Into<String>) -> SteeringError {
    SteeringError::Tensor { tensor: shown(tensor), offset, reason: reason.into() }
}

/// A name from the file as an error shows it: short, on one line.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(64).flat_map(char::escape_debug).collect()
}

struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, needed: u64, what: impl FnOnce() -> String) -> Result<&'a [u8], SteeringError> {
        let rest = &self.bytes[self.offset..];
        match usize::try_from(needed).ok().and_then(|needed| rest.get(..needed)) {
            Some(taken) => {
                self.offset += taken.len();
                Ok(taken)
            }
            None => Err(SteeringError::Truncated { offset: self.offset, what: what(), needed, left: rest.len() }),
        }
    }

    fn skip(&mut self, length: u64, what: impl FnOnce() -> String) -> Result<(), SteeringError> {
        self.take(length, what).map(|_| ())
    }

    fn array_with<const N: usize>(&mut self, what: impl FnOnce() -> String) -> Result<[u8; N], SteeringError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], SteeringError> {
        self.array_with(|| what.to_owned())
    }

    fn uint32_with(&mut self, what: impl FnOnce() -> String) -> Result<u32, SteeringError> {
        self.array_with(what).map(u32::from_le_bytes)
    }

    fn uint64_with(&mut self, what: impl FnOnce() -> String) -> Result<u64, SteeringError> {
        self.array_with(what).map(u64::from_le_bytes)
    }

    fn uint32(&mut self, what: &str) -> Result<u32, SteeringError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn uint64(&mut self, what: &str) -> Result<u64, SteeringError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string's bytes: length, then so many.
    fn text(&mut self, what: impl Fn() -> String) -> Result<&'a [u8], SteeringError> {
        let length = self.uint64_with(&what)?;
        self.take(length, what)
    }

    /// The name of a key or tensor: `kind` says which, `error` makes its error.
    fn name(
        &mut self,
        kind: &str,
        longest: u64,
        error: fn(&str, usize, String) -> SteeringError,
    ) -> Result<&'a str, SteeringError> {
        let start = self.offset;
        let name = self.text(|| format!("the name of a {kind}"))?;
        let text = str::from_utf8(name)
            .map_err(|_| error(&String::from_utf8_lossy(&name[..name.len().min(64)]), start, "not UTF-8".to_owned()))?;
        if text.is_empty() || name.len() as u64 > longest {
            let reason = format!("a {kind}'s name of {} bytes, expected 1 to {longest}", name.len());
            return Err(error(text, start, reason));
        }
        Ok(text)
    }
}
