//! Answers of a given form: which tokens may come next, by llguidance.
//!
//! llama.cpp's own grammars are not used: accepting a token that one forbids throws a C++ exception, which ends a Rust process, and its parser recurses as deep as
//! a grammar that a stranger sends. llguidance is Rust, bounds what a schema may cost, and says what is wrong with one.

use super::scheduler::Form;
use super::{EngineError, Model};
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;
use std::fmt;
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};

/// Makes forms for the answers of one model.
pub struct Forms {
    factory: ParserFactory,
}

/// What marks the bytes of a token that is no text, as llguidance has it.
const SPECIAL: u8 = 0xFF;

impl Forms {
    /// Reads the whole vocabulary of `model`, once: some hundred milliseconds for a large one.
    ///
    /// # Errors
    /// llguidance can't take it.
    pub fn of(model: &Model) -> Result<Self, EngineError> {
        let vocab = model.llama().vocab();
        let n_vocab = model.llama().n_vocab();
        let mut ends: Vec<u32> =
            (0..n_vocab).filter(|token| vocab.is_eog(LlamaToken(*token))).map(|token| token as u32).collect();
        // The one that the model itself calls so comes first.
        let own = [vocab.eot(), vocab.eos()].into_iter().find(|token| token.0 >= 0).map_or(0, |token| token.0 as u32);
        ends.retain(|token| *token != own);
        ends.insert(0, own);
        let spelt = |token: LlamaToken| {
            let bytes = vocab.token_to_piece(token, false, None);
            if !bytes.is_empty() {
                return bytes;
            }
            let special = vocab.token_to_piece(token, true, None);
            if special.is_empty() { special } else { [&[SPECIAL][..], &special].concat() }
        };
        let words: Vec<Vec<u8>> = (0..n_vocab).map(|token| spelt(LlamaToken(token))).collect();
        let trie = TokTrie::from(&TokRxInfo::new(n_vocab as u32, own), &words).with_eos_tokens(&ends);
        let environment: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let problem = |error: &dyn fmt::Display| EngineError::Form { reason: error.to_string() };
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| problem(&error))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// Answers that are JSON by `schema`, written as Python writes it, with no more white space than that.
    ///
    /// # Errors
    /// It is no JSON schema, asks for what can't be kept to, or costs too much.
    pub fn json_schema(&self, mut schema: Value) -> Result<Box<dyn Form>, EngineError> {
        if let Value::Object(schema) = &mut schema {
            // Free white space is where small models get lost.
            schema.insert("x-guidance".into(), serde_json::json!({ "whitespace_flexible": false }));
        }
        let problem = |error: &dyn fmt::Display| EngineError::Form { reason: error.to_string() };
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let mut matcher = Matcher::new(Ok(parser.map_err(|error| problem(&error))?));
        // Some that no answer can keep to are found when the first token is looked for.
        matcher.compute_mask_or_eos().map_err(|error| problem(&error))?;
        Ok(Box::new(JsonForm(matcher)))
    }

    /// Answers that are any JSON object.
    ///
    /// # Errors
    /// None that is known.
    pub fn json_object(&self) -> Result<Box<dyn Form>, EngineError> {
        self.json_schema(serde_json::json!({ "type": "object" }))
    }
}

struct JsonForm(Matcher);

impl fmt::Debug for JsonForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JsonForm")
    }
}

impl Form for JsonForm {
    fn restrict(&mut self, candidates: &mut [LlamaTokenData]) -> Result<(), String> {
        let allowed = self.0.compute_mask_or_eos().map_err(|error| error.to_string())?;
        let mut any = false;
        for candidate in candidates {
            if allowed.is_allowed(candidate.id().0 as u32) {
                any = true;
            } else {
                candidate.set_logit(f32::NEG_INFINITY);
            }
        }
        if any { Ok(()) } else { Err("no token can come next".into()) }
    }

    fn accept(&mut self, token: LlamaToken) -> Result<(), String> {
        self.0.consume_token(token.0 as u32).map_err(|error| error.to_string())
    }

    fn copy(&self) -> Box<dyn Form> {
        Box::new(Self(self.0.deep_clone()))
    }
}
