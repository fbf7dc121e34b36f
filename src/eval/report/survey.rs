use serde::{Deserialize, Serialize};

/// What a survey found of every pair of layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Survey {
    pub pairs: Vec<LayerPair>,
}

/// How well a mapping from a layer of the source to a layer of the target does. Other keys of the file are left alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerPair {
    pub source: u32,
    pub target: u32,
    #[serde(default)]
    pub fraction_unexplained: Option<f64>,
    #[serde(default)]
    pub cosine: Option<f64>,
    #[serde(default)]
    pub cca: Option<f64>,
}

impl Survey {
    /// Reads a survey: a JSON array of pairs.
    ///
    /// # Errors
    /// What is wrong with the text, with its line.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        Ok(Self { pairs: serde_json::from_str(text)? })
    }

    /// The measures that some pair has: name, what it tells, and its value of a pair.
    pub(super) fn measures(&self) -> Vec<Measure> {
        const ALL: [Measure; 3] = [
            Measure { name: "Variance explained", of: |pair| pair.fraction_unexplained.map(|left| 1.0 - left) },
            Measure { name: "Cosine of mapped and true activations", of: |pair| pair.cosine },
            Measure { name: "Canonical correlation", of: |pair| pair.cca },
        ];
        ALL.into_iter().filter(|measure| self.pairs.iter().any(|pair| (measure.of)(pair).is_some())).collect()
    }
}

/// A column of a survey: higher is better.
#[derive(Clone, Copy)]
pub(super) struct Measure {
    pub name: &'static str,
    pub of: fn(&LayerPair) -> Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_be_missing() {
        let survey =
            Survey::parse(r#"[{"source":16,"target":9,"cosine":0.9,"more":1},{"source":0,"target":1}]"#).unwrap();
        let names: Vec<_> = survey.measures().iter().map(|measure| measure.name).collect();
        assert_eq!((survey.pairs.len(), names), (2, vec!["Cosine of mapped and true activations"]));
        assert!(Survey::parse(r#"[{"source":16}]"#).unwrap_err().to_string().contains("target"));
    }
}
