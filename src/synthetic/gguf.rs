//! GGUF, version 3, little-endian, written front to back (`ggml/include/gguf.h`).

use super::TensorType;
use std::io::{self, Write};

/// `GGUF_DEFAULT_ALIGNMENT`: where each tensor's data begins.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Text(String),
    Uint32(u32),
    Float32(f32),
    Bool(bool),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

/// A tensor as the file's head describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// ggml's order: the length of a row first. A row is a whole number of blocks.
    pub dimensions: Vec<u64>,
    pub kind: TensorType,
}

impl TensorInfo {
    /// Bytes of its data, without padding.
    pub fn bytes(&self) -> u64 {
        self.dimensions.iter().product::<u64>() / self.kind.block_length() * self.kind.block_bytes()
    }
}

/// Writes a file of which the head is known and the data comes piece by piece, tensor after tensor.
pub struct GgufWriter<W> {
    out: W,
    /// Bytes of data that each tensor still lacks, the last tensor first.
    missing: Vec<u64>,
    padding: u64,
    written: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the head.
    ///
    /// # Errors
    /// As `out`'s.
    pub fn begin(mut out: W, metadata: &[(String, Value)], tensors: &[TensorInfo]) -> io::Result<Self> {
        let head = head(metadata, tensors);
        out.write_all(&head)?;
        let missing: Vec<u64> = tensors.iter().rev().map(TensorInfo::bytes).collect();
        let padding = missing.last().map_or(0, |bytes| padding(*bytes));
        Ok(Self { out, missing, padding, written: head.len() as u64 })
    }

    /// Writes the next piece of the current tensor's data; after its last the next tensor is the current one.
    ///
    /// # Errors
    /// As `out`'s, and [`io::ErrorKind::InvalidInput`] for more than the tensor lacks.
    pub fn put(&mut self, data: &[u8]) -> io::Result<()> {
        let Some(missing) = self.missing.last_mut().filter(|missing| **missing >= data.len() as u64) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more data than the tensor has room for"));
        };
        self.out.write_all(data)?;
        self.written += data.len() as u64;
        *missing -= data.len() as u64;
        if *missing == 0 {
            self.out.write_all(&[0; ALIGNMENT as usize][..self.padding as usize])?;
            self.written += self.padding;
            self.missing.pop();
            self.padding = self.missing.last().map_or(0, |bytes| padding(*bytes));
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Gives `out` back once all data has come.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where a tensor lacks data.
    pub fn finish(self) -> io::Result<W> {
        if self.missing.is_empty() {
            return Ok(self.out);
        }
        let reason = format!("{} tensors lack data", self.missing.len());
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason))
    }
}

/// Bytes of the whole file.
pub fn file_bytes(metadata: &[(String, Value)], tensors: &[TensorInfo]) -> u64 {
    let data: u64 = tensors.iter().map(|tensor| tensor.bytes() + padding(tensor.bytes())).sum();
    head(metadata, tensors).len() as u64 + data
}

fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT) - bytes
}

/// Everything before the tensors' data.
fn head(metadata: &[(String, Value)], tensors: &[TensorInfo]) -> Vec<u8> {
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut head, key);
        put_value(&mut head, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut head, &tensor.name);
        head.extend((tensor.dimensions.len() as u32).to_le_bytes());
        tensor.dimensions.iter().for_each(|length| head.extend(length.to_le_bytes()));
        head.extend(tensor.kind.id().to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset += tensor.bytes() + padding(tensor.bytes());
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
    head
}

fn put_text(head: &mut Vec<u8>, text: &str) {
    head.extend((text.len() as u64).to_le_bytes());
    head.extend(text.as_bytes());
}

fn put_value(head: &mut Vec<u8>, value: &Value) {
    const UINT32: u32 = 4;
    const INT32: u32 = 5;
    const FLOAT32: u32 = 6;
    const BOOL: u32 = 7;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    fn put_array<T>(head: &mut Vec<u8>, kind: u32, values: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
        head.extend(ARRAY.to_le_bytes());
        head.extend(kind.to_le_bytes());
        head.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| put(head, value));
    }
    let mut put = |kind: u32, bytes: &[u8]| {
        head.extend(kind.to_le_bytes());
        head.extend(bytes);
    };
    match value {
        Value::Uint32(value) => put(UINT32, &value.to_le_bytes()),
        Value::Float32(value) => put(FLOAT32, &value.to_le_bytes()),
        Value::Bool(value) => put(BOOL, &[u8::from(*value)]),
        Value::Text(text) => {
            put(STRING, &[]);
            put_text(head, text);
        }
        Value::Texts(texts) => put_array(head, STRING, texts, |head, text| put_text(head, text)),
        Value::Floats(values) => put_array(head, FLOAT32, values, |head, value| head.extend(value.to_le_bytes())),
        Value::Ints(values) => put_array(head, INT32, values, |head, value| head.extend(value.to_le_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dimensions: &[u64], kind: TensorType) -> TensorInfo {
        TensorInfo { name: name.into(), dimensions: dimensions.to_vec(), kind }
    }

    #[test]
    fn data_in_any_pieces_makes_the_same_file() {
        let tensors = [tensor("a", &[3], TensorType::F32), tensor("b", &[32, 2], TensorType::Q4_0)];
        let metadata = [("general.architecture".to_owned(), Value::Text("llama".into()))];
        let data: Vec<u8> = (0..48).collect();
        let written = |pieces: &[&[u8]]| {
            let mut writer = GgufWriter::begin(Vec::new(), &metadata, &tensors).unwrap();
            pieces.iter().for_each(|piece| writer.put(piece).unwrap());
            let written = writer.written();
            let file = writer.finish().unwrap();
            assert_eq!(file.len() as u64, written);
            file
        };
        let file = written(&[&data[..12], &data[12..]]);
        assert_eq!(file, written(&[&data[..5], &data[5..12], &data[12..40], &data[40..]]));
        assert_eq!(file.len() as u64, file_bytes(&metadata, &tensors));
        // The second tensor's data lies at the next multiple of 32 after the first's.
        assert_eq!(file[file.len() - 64..][..36], data[12..]);
        assert_eq!(file[file.len() - 96..][..12], data[..12]);
    }

    #[test]
    fn too_much_and_too_little_data_are_errors() {
        let tensors = [tensor("a", &[2], TensorType::F32)];
        let mut writer = GgufWriter::begin(Vec::new(), &[], &tensors).unwrap();
        assert_eq!(writer.put(&[0; 9]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        writer.put(&[0; 4]).unwrap();
        assert_eq!(writer.finish().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut writer = GgufWriter::begin(Vec::new(), &[], &tensors).unwrap();
        writer.put(&[0; 8]).unwrap();
        assert_eq!(writer.put(&[0; 1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
