//! Whole conversations, put into the template that a GGUF brings (`tokenizer.chat_template`, Jinja).
//!
//! [`PromptTemplate`] is for single prompts, which guards are made and measured with; it goes by llama.cpp's list of known templates, which writes no default
//! system turn. A server is asked for conversations, and must write what the model was trained on, so it renders the template itself. llama-cpp-2 gives no
//! access to llama.cpp's own Jinja.

use super::{EngineError, Model, PromptTemplate};
use llama_cpp_2::token::LlamaToken;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`, or whatever else the template knows.
    pub role: String,
    pub content: String,
}

/// How a model reads conversations.
pub struct ChatTemplate {
    form: Form,
    bos: String,
    eos: String,
    /// Whether the tokenizer puts `bos` before a text itself.
    adds_bos: bool,
}

enum Form {
    Jinja(Box<Environment<'static>>),
    /// A text with `{prompt}` in it for each turn of the user, what the model said behind it, and system turns before all.
    Turns {
        before: String,
        after: String,
    },
}

const NAME: &str = "chat";

/// Instructions that a template may take, so that none runs for ever: some thousand times what one takes for a message.
const FUEL: u64 = 10_000_000;

/// Stands in for the content of message `n` while the template's own text is found: characters for private use, which no template holds.
fn stand_in(n: usize) -> String {
    format!("\u{F8F0}{n}\u{F8F1}")
}

impl ChatTemplate {
    /// The template of `model`'s file; where it has none the one that the model was loaded with, and else turns one behind the other.
    ///
    /// # Errors
    /// The file's template is no Jinja that can be read.
    pub fn of(model: &Model) -> Result<Self, EngineError> {
        let llama = model.llama();
        let vocab = llama.vocab();
        let spelt = |token| String::from_utf8_lossy(&vocab.token_to_piece(token, true, None)).into_owned();
        let (bos, eos) = (spelt(vocab.bos()), spelt(vocab.eos()));
        let form = match (model.template(), llama.chat_template(None)) {
            (PromptTemplate::Chat, Ok(template)) => {
                let source = template.to_string().map_err(|error| problem(&error))?;
                Form::Jinja(Box::new(environment(&source).map_err(|error| problem(&error))?))
            }
            (PromptTemplate::Text(text), _) => {
                let (before, after) = text
                    .split_once(super::prompt::PLACEHOLDER)
                    .ok_or_else(|| problem(&format!("`{text}` has no `{}`", super::prompt::PLACEHOLDER)))?;
                Form::Turns { before: before.to_owned(), after: after.to_owned() }
            }
            _ => Form::Turns { before: String::new(), after: "\n".to_owned() },
        };
        let adds_bos = vocab.tokenize(b"a", true, true).first() == Some(&vocab.bos());
        Ok(Self { form, bos, eos, adds_bos })
    }

    /// The text that the model reads for `messages`, up to where it is to answer.
    ///
    /// # Errors
    /// The template refuses them (roles that it does not know, or in an order that it does not allow).
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, EngineError> {
        match &self.form {
            Form::Jinja(environment) => {
                let context = minijinja::context! {
                    messages => Value::from(Serde(messages)),
                    add_generation_prompt => true,
                    bos_token => &self.bos,
                    eos_token => &self.eos,
                };
                environment.get_template(NAME).and_then(|template| template.render(context)).map_err(|error| {
                    // A template's own words, by `raise_exception`, say it best.
                    problem(&error.detail().map_or_else(|| error.to_string(), str::to_owned))
                })
            }
            Form::Turns { before, after } => {
                let mut text = String::new();
                for ChatMessage { role, content } in messages {
                    match role.as_str() {
                        "system" | "developer" => text = format!("{content}\n\n{text}"),
                        "assistant" => {
                            let space = if text.ends_with(char::is_whitespace) { "" } else { " " };
                            text += &format!("{space}{content}\n\n");
                        }
                        _ => text += &format!("{before}{content}{after}"),
                    }
                }
                Ok(text)
            }
        }
    }

    /// The tokens that the model reads for `messages`. What spells a control token in a message is read as plain text, so that no message can end its own
    /// turn.
    ///
    /// # Errors
    /// As [`render`](Self::render), and a template that does not carry such a message over as it is.
    pub fn tokens(&self, model: &Model, messages: &[ChatMessage]) -> Result<Vec<LlamaToken>, EngineError> {
        let vocab = model.llama().vocab();
        let spells_control = |message: &ChatMessage| {
            vocab.tokenize(message.content.as_bytes(), false, true).iter().any(|token| vocab.is_control(*token))
        };
        if !messages.iter().any(spells_control) {
            return Ok(vocab.tokenize(self.without_bos(self.render(messages)?).as_bytes(), true, true));
        }
        let stood_in: Vec<ChatMessage> = messages
            .iter()
            .enumerate()
            .map(|(n, message)| ChatMessage { role: message.role.clone(), content: stand_in(n) })
            .collect();
        let text = self.without_bos(self.render(&stood_in)?);
        let mut rest = text.as_str();
        let mut tokens = Vec::new();
        loop {
            // Whichever comes next: a template may turn messages round, or leave one out.
            let next = (0..messages.len()).filter_map(|n| rest.find(&stand_in(n)).map(|at| (at, n))).min();
            let own = next.map_or(rest, |(at, _)| &rest[..at]);
            tokens.extend(vocab.tokenize(own.as_bytes(), tokens.is_empty(), true));
            let Some((at, n)) = next else { return Ok(tokens) };
            tokens.extend(vocab.tokenize(messages[n].content.as_bytes(), false, false));
            rest = &rest[at + stand_in(n).len()..];
        }
    }

    /// Where the tokenizer puts the first token before a text itself, a template that writes it too would have it twice. (Where it does not, the template's may
    /// be the only one: SmolLM2 begins each turn with it, the first too.)
    fn without_bos(&self, text: String) -> String {
        match text.strip_prefix(&self.bos) {
            Some(rest) if self.adds_bos && !self.bos.is_empty() => rest.to_owned(),
            _ => text,
        }
    }
}

fn problem(reason: &dyn std::fmt::Display) -> EngineError {
    EngineError::Template { reason: reason.to_string() }
}

/// Jinja as Hugging Face's `transformers` sets it up for chat templates.
fn environment(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_template_owned(NAME, source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))?;
    Ok(environment)
}

/// JSON as Python writes it: nothing escaped for HTML, a space behind commas and colons.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let wrong = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let json = serde_json::to_value(value).map_err(wrong)?;
    let mut written = Vec::new();
    match indent {
        Some(n) => {
            let spaces = b" ".repeat(n);
            let form = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut written, form)).map_err(wrong)?;
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut written, Spaced)).map_err(wrong)?,
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&written).into_owned()))
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jinja(source: &str) -> ChatTemplate {
        let form = Form::Jinja(Box::new(environment(source).unwrap()));
        ChatTemplate { form, bos: "<s>".into(), eos: "</s>".into(), adds_bos: true }
    }

    fn say(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into() }
    }

    /// As `jinja2` 3.1 with `trim_blocks` and `lstrip_blocks` renders it.
    #[test]
    fn templates_are_rendered_as_transformers_renders_them() {
        let chatml = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let expected =
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(jinja(chatml).render(&[say("user", "Hi")]).unwrap(), expected);

        let python = "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'system' %}\n{{ m.content.strip().upper() }}\n    {% else %}\n{{ m['content'] | trim }}!\n    {% endif %}\n{% endfor %}\n{{ {'a': [1, '<b>']} | tojson }}";
        let rendered = jinja(python).render(&[say("system", " be brief "), say("user", " hi ")]).unwrap();
        assert_eq!(rendered, "<s>BE BRIEF\nhi!\n{\"a\": [1, \"<b>\"]}");
    }

    #[test]
    fn what_a_template_refuses_is_told_in_its_own_words() {
        let strict =
            jinja("{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}");
        let error = strict.render(&[say("assistant", "Hi")]).unwrap_err();
        assert_eq!(error.to_string(), "the model's chat template can't be applied: Roles must alternate");
    }

    #[test]
    fn a_template_that_never_ends_is_ended() {
        let endless = jinja("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}");
        assert!(endless.render(&[say("user", "Hi")]).is_err());
    }

    #[test]
    fn without_a_template_turns_follow_each_other() {
        let form = Form::Turns { before: "Instruction: ".into(), after: "\nResponse:".into() };
        let template = ChatTemplate { form, bos: String::new(), eos: String::new(), adds_bos: true };
        let turns = [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Hello."), say("user", "Bye")];
        assert_eq!(
            template.render(&turns).unwrap(),
            "Be brief.\n\nInstruction: Hi\nResponse: Hello.\n\nInstruction: Bye\nResponse:"
        );
    }
}
