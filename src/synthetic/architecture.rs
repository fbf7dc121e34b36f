use super::SyntheticError;
use std::fmt;
use std::str::FromStr;

/// An architecture of llama.cpp's whose graph names the residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    Llama,
    /// Biases at queries, keys and values.
    Qwen2,
    /// Norms of queries and keys.
    Qwen3,
    /// Norms of queries, keys and what each part gives; layers that see a sliding window.
    Gemma3,
}

impl Architecture {
    pub const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// `general.architecture`
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Architecture {
    type Err = SyntheticError;

    fn from_str(name: &str) -> Result<Self, SyntheticError> {
        let found = Self::ALL.into_iter().find(|architecture| architecture.name() == name);
        found.ok_or_else(|| SyntheticError::Name {
            what: "architecture",
            found: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}
