use crate::learn::SurveyedPair;

/// What a survey tells of a pair of layers: higher is better.
#[derive(Clone, Copy)]
pub struct Measure {
    pub name: &'static str,
    pub of: fn(&SurveyedPair) -> f64,
}

pub const MEASURES: [Measure; 4] = [
    Measure { name: "Variance explained in cross-validation", of: |pair| 1.0 - pair.cross_validated },
    Measure { name: "Cosine of mapped and true activations", of: |pair| pair.cosine },
    Measure { name: "Squared canonical correlation", of: |pair| pair.cca },
    Measure { name: "Centred kernel alignment", of: |pair| pair.cka },
];
