use super::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;

/// A model, whatever its quantization.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// What people call it; identifies nothing.
    pub name: String,
    /// `general.architecture` of its GGUF.
    pub architecture: String,
    pub fingerprint: Fingerprint,
    /// What its weights are changed by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterIdentity>,
}

/// A LoRA adapter that a model carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterIdentity {
    /// What people call it; identifies nothing.
    pub name: String,
    /// Of its file.
    pub sha256: Digest,
    /// Times that it is added to the weights.
    pub scale: f64,
}

impl AdapterIdentity {
    /// Adapters as a sentence has them: `without adapters`, `with adapter …`.
    pub fn listed(adapters: &[Self]) -> String {
        let one = |Self { name, sha256, scale }: &Self| {
            format!("`{name}` (sha256 {}, times {scale})", &sha256.to_string()[..12])
        };
        match adapters {
            [] => "without adapters".to_owned(),
            [only] => format!("with adapter {}", one(only)),
            several => format!("with adapters {}", several.iter().map(one).collect::<Vec<_>>().join(", ")),
        }
    }

    /// Whether both change weights alike: order and names are no matter, nor is one that is added no times.
    pub fn alike(one: &[Self], other: &[Self]) -> bool {
        let acting = |adapters: &[Self]| {
            let mut acting: Vec<_> =
                adapters.iter().filter(|of| of.scale != 0.0).map(|of| (of.sha256, of.scale)).collect();
            acting.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
            acting
        };
        acting(one) == acting(other)
    }
}

/// Identity of a model by its shape and vocabulary: the same for every quantization of it.
///
/// It does not see the weights, so a fine-tuned model has its base's fingerprint; a guard's [`Probe`](super::Probe) tells them apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(Digest);

impl Fingerprint {
    /// `vocabulary` is every token's text and kind, in order, as llama.cpp gives them.
    ///
    /// It is the sha256 of these bytes, integers little-endian, which no two models share:
    ///
    /// ```text
    /// "pilotfish-fingerprint-1"  23 bytes
    /// architecture               u64 length, bytes
    /// n_embd, n_layer            u32, u32
    /// number of tokens           u64
    /// for each token             u64 length, bytes, u32 kind
    /// ```
    pub fn compute<T: AsRef<[u8]>>(
        architecture: &str,
        n_embd: u32,
        n_layer: u32,
        vocabulary: impl ExactSizeIterator<Item = (T, u32)>,
    ) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"pilotfish-fingerprint-1");
        update_with_length(&mut hasher, architecture.as_bytes());
        hasher.update(n_embd.to_le_bytes());
        hasher.update(n_layer.to_le_bytes());
        hasher.update((vocabulary.len() as u64).to_le_bytes());
        for (text, kind) in vocabulary {
            update_with_length(&mut hasher, text.as_ref());
            hasher.update(kind.to_le_bytes());
        }
        Self(Digest::finish(hasher))
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

fn update_with_length(hasher: &mut Sha256, bytes: &[u8]) {
    hasher.update((bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_alike_that_change_weights_alike() {
        let adapter =
            |name: &str, scale| AdapterIdentity { name: name.into(), sha256: Digest::of(name.as_bytes()), scale };
        let (a, b) = (adapter("a", 1.0), adapter("b", 0.5));
        let renamed = AdapterIdentity { name: "c".into(), ..a.clone() };
        assert!(AdapterIdentity::alike(&[a.clone(), b.clone()], &[b.clone(), renamed]));
        assert!(AdapterIdentity::alike(&[], &[adapter("a", 0.0)]));
        for other in
            [vec![], vec![b.clone()], vec![a.clone(), b.clone()], vec![adapter("a", 0.9)], vec![a.clone(), a.clone()]]
        {
            assert!(!AdapterIdentity::alike(std::slice::from_ref(&a), &other), "{other:?}");
        }
        assert_eq!(AdapterIdentity::listed(&[]), "without adapters");
        let listed = AdapterIdentity::listed(&[a, b]);
        assert!(listed.starts_with("with adapters `a` (sha256 ") && listed.ends_with(", times 0.5)"), "{listed}");
    }

    type Vocabulary<'a> = &'a [(&'a str, u32)];

    fn compute(architecture: &str, n_embd: u32, n_layer: u32, vocabulary: Vocabulary<'_>) -> String {
        Fingerprint::compute(architecture, n_embd, n_layer, vocabulary.iter().copied()).to_string()
    }

    #[test]
    fn the_encoding_is_fixed() {
        let mut bytes = b"pilotfish-fingerprint-1".to_vec();
        bytes.extend(b"\x05\0\0\0\0\0\0\0llama\x40\x02\0\0\x1e\0\0\0\x02\0\0\0\0\0\0\0");
        bytes.extend(b"\x02\0\0\0\0\0\0\0ab\x01\0\0\0\0\0\0\0\0\0\0\0\x06\0\0\0");
        assert_eq!(compute("llama", 576, 30, &[("ab", 1), ("", 6)]), Digest::of(&bytes).to_string());
    }

    #[test]
    fn everything_in_it_counts() {
        let base = ("llama", 576, 30, &[("ab", 1), ("c", 1)][..]);
        let others: [(&str, u32, u32, Vocabulary<'_>); 8] = [
            ("llamb", 576, 30, &[("ab", 1), ("c", 1)]),
            ("llama", 577, 30, &[("ab", 1), ("c", 1)]),
            ("llama", 576, 31, &[("ab", 1), ("c", 1)]),
            ("llama", 576, 30, &[("a", 1), ("bc", 1)]),
            ("llama", 576, 30, &[("abc", 1), ("", 1)]),
            ("llama", 576, 30, &[("c", 1), ("ab", 1)]),
            ("llama", 576, 30, &[("ab", 1), ("c", 2)]),
            ("llama", 576, 30, &[("ab", 1)]),
        ];
        let base = compute(base.0, base.1, base.2, base.3);
        for other in others {
            assert_ne!(compute(other.0, other.1, other.2, other.3), base, "{other:?}");
        }
    }

    #[test]
    fn it_is_read_as_it_is_written() {
        let text = compute("llama", 1, 1, &[]);
        let found: Fingerprint = text.parse().unwrap();
        assert_eq!(found.to_string(), text);
        assert_eq!(found.short(), text[..12]);
        assert_eq!(text.to_uppercase().parse(), Ok(found));
        assert_eq!(serde_json::to_value(found).unwrap(), text);
        for bad in ["", "12", &text[1..], &format!("{text}0"), &format!("g{}", &text[1..]), &"é".repeat(32)] {
            assert!(bad.parse::<Fingerprint>().unwrap_err().contains("64 hexadecimal digits"), "{bad}");
        }
    }
}
