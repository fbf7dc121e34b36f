use super::LayerIndex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// One layer, or several whose residuals are read as one row, beside each other in this order. Files and the command line write `24` or
/// `14+16+18`; in TOML and JSON it is a number or a list of numbers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerStack(Vec<LayerIndex>);

/// Layers a stack may have: as many as any model.
const MAX_STACKED: usize = 1024;

impl LayerStack {
    /// `None` unless there is one layer at least and each is above the one before it: so one set of layers has one name.
    pub fn new(layers: Vec<LayerIndex>) -> Option<Self> {
        let ascending = layers.is_sorted_by(|a, b| a < b);
        (!layers.is_empty() && layers.len() <= MAX_STACKED && ascending).then_some(Self(layers))
    }

    pub fn layers(&self) -> &[LayerIndex] {
        &self.0
    }

    /// The layer, where there is only one.
    pub fn single(&self) -> Option<LayerIndex> {
        match self.0.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }
}

impl From<LayerIndex> for LayerStack {
    fn from(layer: LayerIndex) -> Self {
        Self(vec![layer])
    }
}

impl PartialEq<LayerIndex> for LayerStack {
    fn eq(&self, layer: &LayerIndex) -> bool {
        self.single() == Some(*layer)
    }
}

impl fmt::Display for LayerStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, layer) in self.0.iter().enumerate() {
            let plus = if index == 0 { "" } else { "+" };
            write!(f, "{plus}{layer}")?;
        }
        Ok(())
    }
}

/// What is no stack of layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a layer, or several in rising order, as `24` or `14+16+18`")]
pub struct NoLayerStack;

impl FromStr for LayerStack {
    type Err = NoLayerStack;

    /// No sign, space or leading zero: one stack, one spelling.
    fn from_str(text: &str) -> Result<Self, NoLayerStack> {
        let layer = |part: &str| part.parse().ok().filter(|layer: &u32| layer.to_string() == part).map(LayerIndex);
        let layers: Option<Vec<_>> = text.split('+').map(layer).collect();
        layers.and_then(Self::new).ok_or(NoLayerStack)
    }
}

impl Serialize for LayerStack {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.single() {
            Some(layer) => layer.serialize(serializer),
            None => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for LayerStack {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = LayerStack;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a layer, or a list of two layers or more in rising order")
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<LayerStack, E> {
                let layer = u32::try_from(value);
                layer
                    .map(|layer| LayerIndex(layer).into())
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(value), &self))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<LayerStack, E> {
                let found = serde::de::Unexpected::Signed(value);
                u64::try_from(value).map_err(|_| E::invalid_value(found, &self)).and_then(|value| self.visit_u64(value))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<LayerStack, A::Error> {
                let mut layers = Vec::new();
                while let Some(layer) = list.next_element::<LayerIndex>()? {
                    if layers.len() == MAX_STACKED {
                        return Err(serde::de::Error::invalid_length(layers.len() + 1, &self));
                    }
                    layers.push(layer);
                }
                // A list of one would be a second spelling of the layer itself.
                let stack = LayerStack::new(layers).filter(|stack| stack.single().is_none());
                stack.ok_or_else(|| serde::de::Error::invalid_value(serde::de::Unexpected::Seq, &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_has_one_spelling() {
        for text in ["24", "14+16+18", "0+1"] {
            let stack: LayerStack = text.parse().unwrap();
            assert_eq!(stack.to_string(), text);
            let json = serde_json::to_string(&stack).unwrap();
            assert_eq!(serde_json::from_str::<LayerStack>(&json).unwrap(), stack);
        }
        assert_eq!(serde_json::to_string(&"14+16".parse::<LayerStack>().unwrap()).unwrap(), "[14,16]");
        for text in ["", "+", "16+14", "14+14", "014", " 14", "14+", "-1", "4294967296"] {
            assert_eq!(text.parse::<LayerStack>(), Err(NoLayerStack), "{text}");
        }
        for json in ["[]", "[14]", "[16,14]", "-1", "4294967296", "1.5", "\"14+16\"", "[14,-1]"] {
            assert!(serde_json::from_str::<LayerStack>(json).is_err(), "{json}");
        }
    }
}
