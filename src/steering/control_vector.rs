use super::SteeringError;
use super::gguf::{self, DEFAULT_ALIGNMENT, MAGIC, TENSOR_F32, TYPE_STRING, TYPE_UINT32, VERSION, Value};
use crate::tensor::LayerIndex;
use std::collections::BTreeMap;

const ARCHITECTURE: &str = "controlvector";
const ARCHITECTURE_KEY: &str = "general.architecture";
const MODEL_HINT_KEY: &str = "controlvector.model_hint";
const LAYER_COUNT_KEY: &str = "controlvector.layer_count";
const DIRECTION_PREFIX: &str = "direction.";

/// What llama.cpp adds to the residual at each layer: its control-vector GGUF, as `cvector-generator` and repeng write it.
///
/// `direction.N` acts at graph layer N: `common_control_vector_load_one` (`common/common.cpp`) puts it at row N − 1 of its
/// buffer, `llama_adapter_cvec::apply` (`src/llama-adapter.cpp`) gives row N − 1 to layer N, and the model graphs add it there
/// just before naming the result `l_out-N`. So adding it to the residual read at [`LayerIndex`] N does the same.
/// There is no direction for layer 0, which llama.cpp refuses and so does this type.
///
/// The name of a direction is the only thing that says where it acts. `controlvector.layer_count` is not read, by llama.cpp or
/// here: generators write the number of directions or the number of layers. It is written as the number of directions.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVector {
    model_hint: String,
    directions: BTreeMap<LayerIndex, Vec<f32>>,
}

impl ControlVector {
    /// `model_hint` is the architecture of the model the directions are for, or empty.
    ///
    /// # Errors
    /// If there are no directions, one is at a layer llama.cpp cannot take, their widths differ or are 0, or a value is not finite.
    pub fn new(model_hint: String, directions: BTreeMap<LayerIndex, Vec<f32>>) -> Result<Self, SteeringError> {
        let expected = directions.values().next().ok_or(SteeringError::NoDirections)?.len().max(1);
        for (&layer, direction) in &directions {
            if layer.0 == 0 || i32::try_from(layer.0).is_err() {
                return Err(SteeringError::DirectionLayer { layer });
            }
            if direction.len() != expected {
                return Err(SteeringError::DirectionWidth { layer, expected, found: direction.len() });
            }
            if let Some((index, &value)) = direction.iter().enumerate().find(|(_, value)| !value.is_finite()) {
                return Err(SteeringError::NonFiniteDirection { layer, index, value });
            }
        }
        Ok(Self { model_hint, directions })
    }

    /// The architecture the file says it is for; empty where it does not say. Only a hint: it identifies no model.
    pub fn model_hint(&self) -> &str {
        &self.model_hint
    }

    /// At least one direction, each `[width]` and finite, all of one width.
    pub fn directions(&self) -> &BTreeMap<LayerIndex, Vec<f32>> {
        &self.directions
    }

    pub fn into_directions(self) -> BTreeMap<LayerIndex, Vec<f32>> {
        self.directions
    }

    /// Reads GGUF version 2 or 3, little-endian.
    ///
    /// Stricter than llama.cpp in this: the architecture must be `controlvector`, `N` must be a plain number, a value must be
    /// finite.
    ///
    /// # Errors
    /// Whatever is malformed, with where and why. Nothing in the bytes can make this panic or reserve more than their size.
    pub fn from_gguf(bytes: &[u8]) -> Result<Self, SteeringError> {
        let file = gguf::parse(bytes)?;
        match file.values.get(ARCHITECTURE_KEY) {
            Some(Value::Text { bytes, .. }) if *bytes == ARCHITECTURE.as_bytes() => {}
            Some(Value::Text { bytes, .. }) => {
                let found = gguf::shown(&String::from_utf8_lossy(&bytes[..bytes.len().min(64)]));
                return Err(SteeringError::Architecture { found: format!("`{found}`") });
            }
            Some(_) => return Err(SteeringError::Architecture { found: "not a string".to_owned() }),
            None => return Err(SteeringError::Architecture { found: "missing".to_owned() }),
        }
        let model_hint = match file.values.get(MODEL_HINT_KEY) {
            Some(Value::Text { bytes, offset }) => {
                str::from_utf8(bytes).map_err(|_| gguf::key_error(MODEL_HINT_KEY, *offset, "not UTF-8"))?
            }
            Some(Value::Uint32 { offset, .. } | Value::Other { offset }) => {
                return Err(gguf::key_error(MODEL_HINT_KEY, *offset, "not a string"));
            }
            None => "",
        };
        let mut directions = BTreeMap::new();
        for tensor in file.tensors {
            let layer = direction_layer(tensor.name)
                .ok_or_else(|| gguf::tensor_error(tensor.name, tensor.offset, "expected a name `direction.N`"))?;
            directions.insert(layer, tensor.values);
        }
        Self::new(model_hint.to_owned(), directions)
    }

    /// GGUF version 3, little-endian: the three keys of a control vector and one tensor a direction, in the order of layers.
    pub fn to_gguf(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.directions.len() as u64).to_le_bytes());
        bytes.extend(3u64.to_le_bytes());
        for (key, text) in [(ARCHITECTURE_KEY, ARCHITECTURE), (MODEL_HINT_KEY, &self.model_hint)] {
            write_text(&mut bytes, key);
            bytes.extend(TYPE_STRING.to_le_bytes());
            write_text(&mut bytes, text);
        }
        write_text(&mut bytes, LAYER_COUNT_KEY);
        bytes.extend(TYPE_UINT32.to_le_bytes());
        bytes.extend((self.directions.len() as u32).to_le_bytes());
        let mut data = Vec::new();
        for (layer, direction) in &self.directions {
            write_text(&mut bytes, &format!("{DIRECTION_PREFIX}{layer}"));
            bytes.extend(1u32.to_le_bytes());
            bytes.extend((direction.len() as u64).to_le_bytes());
            bytes.extend(TENSOR_F32.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(direction.iter().flat_map(|value| value.to_le_bytes()));
            pad(&mut data);
        }
        pad(&mut bytes);
        bytes.extend(data);
        bytes
    }
}

/// `N` of `direction.N`, written as a plain number: `01`, `+1` and `1x`, which llama.cpp's `stoi` takes for 1, are refused.
fn direction_layer(name: &str) -> Option<LayerIndex> {
    let text = name.strip_prefix(DIRECTION_PREFIX)?;
    let layer: u32 = text.parse().ok()?;
    (layer.to_string() == text).then_some(LayerIndex(layer))
}

fn write_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn pad(bytes: &mut Vec<u8>) {
    let padding = gguf::padding(bytes.len() as u64, DEFAULT_ALIGNMENT);
    bytes.resize(bytes.len() + padding as usize, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A GGUF put together by hand: what `parse` is given is not what `to_gguf` wrote.
    struct Assembly {
        version: u32,
        keys: Vec<Vec<u8>>,
        tensors: Vec<Vec<u8>>,
        data: Vec<u8>,
        alignment: usize,
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn key(name: &str, type_id: u32, value: &[u8]) -> Vec<u8> {
        [&text(name)[..], &type_id.to_le_bytes(), value].concat()
    }

    fn tensor(name: &str, dimensions: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((dimensions.len() as u32).to_le_bytes());
        bytes.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
        bytes.extend(type_id.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    fn floats(values: &[f32], length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes.resize(length, 0);
        bytes
    }

    impl Assembly {
        /// Two directions of width 3, at layers 2 and 1 in that order.
        fn valid() -> Self {
            Self {
                version: 3,
                keys: vec![
                    key("general.architecture", 8, &text("controlvector")),
                    key("controlvector.model_hint", 8, &text("llama")),
                    key("controlvector.layer_count", 5, &2i32.to_le_bytes()),
                ],
                tensors: vec![tensor("direction.2", &[3], 0, 0), tensor("direction.1", &[3], 0, 32)],
                data: [floats(&[1.0, -2.0, 0.5], 32), floats(&[0.0, 4.0, 8.0], 32)].concat(),
                alignment: 32,
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes = b"GGUF".to_vec();
            bytes.extend(self.version.to_le_bytes());
            bytes.extend((self.tensors.len() as u64).to_le_bytes());
            bytes.extend((self.keys.len() as u64).to_le_bytes());
            bytes.extend(self.keys.concat());
            bytes.extend(self.tensors.concat());
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(&self.data);
            bytes
        }
    }

    fn expected() -> ControlVector {
        let directions = [(LayerIndex(1), vec![0.0, 4.0, 8.0]), (LayerIndex(2), vec![1.0, -2.0, 0.5])];
        ControlVector::new("llama".to_owned(), directions.into()).unwrap()
    }

    #[test]
    fn hand_assembled_bytes_are_read() {
        for version in [2, 3] {
            let bytes = Assembly { version, ..Assembly::valid() }.bytes();
            assert_eq!(ControlVector::from_gguf(&bytes), Ok(expected()));
        }
    }

    #[test]
    fn values_of_every_type_are_skipped() {
        let mut file = Assembly::valid();
        for (type_id, size) in
            [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8)]
        {
            file.keys.push(key(&format!("scalar.{type_id}"), type_id, &vec![1; size]));
            let array = [&type_id.to_le_bytes()[..], &3u64.to_le_bytes(), &vec![1; 3 * size]].concat();
            file.keys.push(key(&format!("array.{type_id}"), 9, &array));
        }
        let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text("a"), &text("")].concat();
        file.keys.push(key("array.8", 9, &strings));
        assert_eq!(ControlVector::from_gguf(&file.bytes()), Ok(expected()));
    }

    #[test]
    fn alignment_trailing_dimensions_and_trailing_bytes_are_as_in_ggml() {
        let mut file = Assembly::valid();
        file.keys.push(key("general.alignment", 4, &4u32.to_le_bytes()));
        file.alignment = 4;
        file.tensors = vec![tensor("direction.2", &[3, 1], 0, 0), tensor("direction.1", &[3, 1, 1, 1], 0, 12)];
        file.data = floats(&[1.0, -2.0, 0.5, 0.0, 4.0, 8.0], 25);
        assert_eq!(ControlVector::from_gguf(&file.bytes()), Ok(expected()));
    }

    #[test]
    fn a_file_without_a_hint_is_read() {
        let mut file = Assembly::valid();
        file.keys.truncate(1);
        assert_eq!(ControlVector::from_gguf(&file.bytes()).unwrap().model_hint(), "");
    }

    #[test]
    fn malformed_files_are_refused_with_the_reason() {
        type Spoil = fn(&mut Assembly);
        let cases: [(Spoil, &str); 31] = [
            (|f| f.version = 1, "GGUF version 1 is not supported"),
            (|f| f.version = 4, "GGUF version 4 is not supported"),
            (|f| f.version = 3u32.swap_bytes(), "GGUF version 50331648 is not supported"),
            (|f| f.keys.clear(), "not a control vector: key `general.architecture` is missing"),
            (
                |f| f.keys[0] = key("general.architecture", 8, &text("llama")),
                "not a control vector: key `general.architecture` is `llama`",
            ),
            (
                |f| f.keys[0] = key("general.architecture", 7, &[1]),
                "not a control vector: key `general.architecture` is not a string",
            ),
            (
                |f| f.keys[1] = key("controlvector.model_hint", 4, &[0; 4]),
                "key `controlvector.model_hint` at byte 113: not a string",
            ),
            (
                |f| f.keys[1] = key("controlvector.model_hint", 8, b"\x01\0\0\0\0\0\0\0\xff"),
                "key `controlvector.model_hint` at byte 113: not UTF-8",
            ),
            (|f| f.keys[1] = f.keys[0].clone(), "key `general.architecture` at byte 77: occurs twice"),
            (|f| f.keys[1] = key("", 7, &[0]), "key `` at byte 77: a key's name of 0 bytes"),
            (|f| f.keys[1] = key(&"k".repeat(65_536), 7, &[0]), "key `kkkkkkkk"),
            (|f| f.keys[1] = b"\x01\0\0\0\0\0\0\0\xff".to_vec(), "key `\u{fffd}` at byte 77: not UTF-8"),
            (|f| f.keys[1] = key("a", 13, &[0]), "key `a` at byte 77: unknown value type 13"),
            (
                |f| f.keys[1] = key("a", 9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
                "key `a` at byte 77: an array of unsupported value type 9",
            ),
            (
                |f| f.keys[1] = key("a", 9, &[&[6, 0, 0, 0][..], &[255; 8]].concat()),
                "truncated at byte 102: the array of key `a` needs 18446744073709551615 bytes",
            ),
            (
                |f| f.keys[1] = key("a", 8, &[255; 8]),
                "truncated at byte 98: the value of key `a` needs 18446744073709551615 bytes",
            ),
            (
                |f| f.keys.push(key("general.alignment", 4, &3u32.to_le_bytes())),
                "key `general.alignment` at byte 196: 3 is not a power of two",
            ),
            (
                |f| f.keys.push(key("general.alignment", 4, &[0; 4])),
                "key `general.alignment` at byte 196: 0 is not a power of two",
            ),
            (
                |f| f.keys.push(key("general.alignment", 10, &[0; 8])),
                "key `general.alignment` at byte 196: not a uint32",
            ),
            (|f| f.tensors.clear(), "the control vector has no directions"),
            (|f| f.tensors[1] = tensor("direction.2", &[3], 0, 32), "tensor `direction.2` at byte 210: occurs twice"),
            (|f| f.tensors[0] = tensor("direction.0", &[3], 0, 0), "a control vector cannot act at layer 0"),
            (
                |f| f.tensors[0] = tensor("direction.2147483648", &[3], 0, 0),
                "a control vector cannot act at layer 2147483648",
            ),
            (
                |f| f.tensors[0] = tensor("direction.01", &[3], 0, 0),
                "tensor `direction.01` at byte 167: expected a name `direction.N`",
            ),
            (
                |f| f.tensors[0] = tensor("blk.0.weight", &[3], 0, 0),
                "tensor `blk.0.weight` at byte 167: expected a name `direction.N`",
            ),
            (
                |f| f.tensors[0] = tensor("direction.2", &[3], 1, 0),
                "tensor `direction.2` at byte 167: has ggml type 1, expected F32 (0)",
            ),
            (
                |f| f.tensors[0] = tensor("direction.2", &[1, 3], 0, 0),
                "tensor `direction.2` at byte 167: has a further dimension of 3",
            ),
            (|f| f.tensors[0] = tensor("direction.2", &[], 0, 0), "tensor `direction.2` at byte 167: has 0 dimensions"),
            (
                |f| f.tensors[0] = tensor("direction.2", &[u64::MAX], 0, 0),
                "tensor `direction.2` at byte 167: has an impossible width",
            ),
            (
                |f| f.tensors[1] = tensor("direction.1", &[3], 0, 0),
                "tensor `direction.1` at byte 210: data at offset 0, expected 32",
            ),
            (
                |f| f.data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
                "the direction at layer 2 has a non-finite value (NaN) at index 0",
            ),
        ];
        for (spoil, expected) in cases {
            let mut file = Assembly::valid();
            spoil(&mut file);
            let error = ControlVector::from_gguf(&file.bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "expected `{expected}`, found `{error}`");
            assert!(error.len() < 300, "{error}");
        }
    }

    #[test]
    fn widths_must_agree_and_not_be_zero() {
        let mut file = Assembly::valid();
        file.tensors = vec![tensor("direction.1", &[3], 0, 0), tensor("direction.2", &[4], 0, 32)];
        let error = ControlVector::from_gguf(&file.bytes()).unwrap_err();
        assert_eq!(error, SteeringError::DirectionWidth { layer: LayerIndex(2), expected: 3, found: 4 });
        file.tensors = vec![tensor("direction.1", &[0], 0, 0)];
        let error = ControlVector::from_gguf(&file.bytes()).unwrap_err();
        assert_eq!(error, SteeringError::DirectionWidth { layer: LayerIndex(1), expected: 1, found: 0 });
    }

    #[test]
    fn what_is_written_has_the_documented_bytes() {
        let file = Assembly {
            keys: vec![
                key("general.architecture", 8, &text("controlvector")),
                key("controlvector.model_hint", 8, &text("llama")),
                key("controlvector.layer_count", 4, &2u32.to_le_bytes()),
            ],
            tensors: vec![tensor("direction.1", &[3], 0, 0), tensor("direction.2", &[3], 0, 32)],
            data: [floats(&[0.0, 4.0, 8.0], 32), floats(&[1.0, -2.0, 0.5], 32)].concat(),
            ..Assembly::valid()
        };
        assert_eq!(expected().to_gguf(), file.bytes());
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let bytes = expected().to_gguf();
        for length in 0..bytes.len() {
            let error = ControlVector::from_gguf(&bytes[..length]).unwrap_err();
            assert!(matches!(error, SteeringError::Truncated { .. }), "cut at {length}: {error}");
        }
        assert_eq!(
            ControlVector::from_gguf(b"GGML....").unwrap_err(),
            SteeringError::Magic { expected: *b"GGUF", found: *b"GGML" }
        );
    }

    fn control_vector() -> impl Strategy<Value = ControlVector> {
        let finite = any::<f32>().prop_filter("finite", |value| value.is_finite());
        (1usize..20, ".{0,12}").prop_flat_map(move |(width, hint)| {
            let direction = proptest::collection::vec(finite.clone(), width);
            proptest::collection::btree_map((1u32..=i32::MAX as u32).prop_map(LayerIndex), direction, 1..6)
                .prop_map(move |directions| ControlVector::new(hint.clone(), directions).unwrap())
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(vector in control_vector()) {
            prop_assert_eq!(ControlVector::from_gguf(&vector.to_gguf()), Ok(vector));
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
            n_tensors in 0u64..3,
            n_keys in 0u64..3,
        ) {
            prop_assert!(ControlVector::from_gguf(&bytes).is_err());
            let header = [&b"GGUF\x03\0\0\0"[..], &n_tensors.to_le_bytes(), &n_keys.to_le_bytes()].concat();
            prop_assert!(ControlVector::from_gguf(&[header, bytes].concat()).is_err());
        }

        #[test]
        fn a_damaged_file_never_panics(
            vector in control_vector(),
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = vector.to_gguf();
            for (place, value) in damage {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            // What is still readable is a valid control vector: it can be written and read again.
            if let Ok(read) = ControlVector::from_gguf(&bytes) {
                prop_assert_eq!(ControlVector::from_gguf(&read.to_gguf()), Ok(read));
            }
        }
    }
}
