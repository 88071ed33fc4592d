//! Chat templates: a conversation as the text that a model was trained to continue. Templates are Jinja, rendered as transformers
//! 5.24 does (`chat_template_utils.py`), but without a clock: a template that writes the date takes the one it has for that.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value as Item, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, context};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Instructions and data that a template may use whatever the text: about 64 MB.
const FUEL: u64 = 1_000_000;
/// Bytes that one unit of fuel pays for.
const FUEL_BYTES: usize = 64;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    pub content: String,
}

/// A model's template.
#[derive(Debug, Clone, Copy)]
pub struct ChatTemplate<'a> {
    pub source: &'a str,
    /// By name (`bos_token`), what the template may write.
    pub special_tokens: &'a BTreeMap<String, String>,
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error("chat template: {0}")]
    Refused(String),
    #[error("chat template: it wants today's date (strftime_now), which would make every day's tokens different ones")]
    Clock,
    #[error("chat template: {0}")]
    Template(String),
}

impl ChatTemplate<'_> {
    /// Renders the messages and the beginning of the assistant's answer.
    ///
    /// # Errors
    /// `Refused` where the template itself does not take such messages, `Clock`, `Template` where it can't be read or runs too long.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let source = without_generation_tags(self.source);
        let mut environment = environment().map_err(|error| ChatError::Template(error.to_string()))?;
        // Fuel pays for steps and for every byte that is made, 64 bytes each: a template may copy the messages some 30 times.
        let n_bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        environment.set_fuel(Some(FUEL + n_bytes as u64 / 2));
        let turn =
            |message: &Message| Item::from_pairs([("role", message.role), ("content", message.content.as_str())]);
        let context = context! {
            messages => messages.iter().map(turn).collect::<Vec<Item>>(),
            add_generation_prompt => true,
            tools => (),
            documents => (),
            ..Item::from_pairs(self.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str())))
        };
        environment.render_str(&source, context).map_err(chat_error)
    }
}

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{message}")))
    });
    environment.add_filter("tojson", to_json);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            let mut paid = PaidText { state, out, n_bytes: 0 };
            write!(paid, "{value}").map_err(|_| minijinja::Error::from(ErrorKind::OutOfFuel))
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    Ok(environment)
}

/// Calls a method of Python's strings, lists and mappings. What `format` fills up is not paid for with fuel, so its widths are bounded.
fn method(state: &mut State<'_, '_>, value: &Item, name: &str, args: &[Item]) -> Result<Item, minijinja::Error> {
    let digits = |text: &str| text.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if name == "format" && value.as_str().is_some_and(|text| digits(text) > MAX_WIDTH_DIGITS) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "a width in format has too many digits"));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Digits of the widest field that `format` may fill up.
const MAX_WIDTH_DIGITS: usize = 4;

/// Marks an error that the template itself raised.
const REFUSED: &str = "refused: ";

fn chat_error(error: minijinja::Error) -> ChatError {
    if error.kind() == ErrorKind::UnknownFunction && error.to_string().contains("strftime_now") {
        return ChatError::Clock;
    }
    match error.detail().and_then(|detail| detail.strip_prefix(REFUSED)) {
        Some(message) => ChatError::Refused(format!("it refuses these messages: {message}")),
        None => ChatError::Template(error.to_string()),
    }
}

/// Turns the tags `generation` and `endgeneration`, with which transformers marks what a model says itself, into blocks without
/// effect.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag[2..end].trim_matches(['-', '+']).trim();
        out.push_str(before);
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Writes JSON as Python's `json.dumps` does, without escaping for HTML.
fn to_json(state: &State<'_, '_>, value: &Item) -> Result<String, minijinja::Error> {
    let mut bytes = Paid { state, bytes: Vec::new() };
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Spaced);
    let fail = |reason: String| minijinja::Error::new(ErrorKind::BadSerialization, reason);
    value.serialize(&mut serializer).map_err(|error| fail(error.to_string()))?;
    String::from_utf8(bytes.bytes).map_err(|error| fail(error.to_string()))
}

/// Bytes that are paid for with fuel before they are kept: a list of lists may be far longer when it is written than in memory.
struct Paid<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
}

impl std::io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let fuel = (self.bytes.len() + bytes.len()) / FUEL_BYTES - self.bytes.len() / FUEL_BYTES;
        self.state.consume_fuel(fuel as u64).map_err(|error| std::io::Error::other(error.to_string()))?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The same for a list or a mapping that a template writes as it is.
struct PaidText<'a, 'b, 'c, 'd> {
    state: &'a State<'b, 'c>,
    out: &'a mut Output<'d>,
    n_bytes: usize,
}

impl std::fmt::Write for PaidText<'_, '_, '_, '_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let before = self.n_bytes / FUEL_BYTES;
        self.n_bytes += text.len();
        let fuel = self.n_bytes / FUEL_BYTES - before;
        self.state.consume_fuel(fuel as u64).map_err(|_| std::fmt::Error)?;
        self.out.write_str(text)
    }
}

/// `{"a": 1, "b": [2, 3]}`.
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

    fn render(source: &str, content: &str) -> Result<String, ChatError> {
        let special_tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        let messages = [
            Message { role: "system", content: "Be brief.".to_owned() },
            Message { role: "user", content: content.to_owned() },
        ];
        ChatTemplate { source, special_tokens: &special_tokens }.render(&messages)
    }

    #[test]
    fn blocks_are_trimmed_and_methods_of_python_work() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n  {% if m.content.strip().startswith('B') %}\n{{ m['role'] | upper }}\
                      {%- endif %}\n{% endfor %}\n{% if add_generation_prompt and tools is none %}A:{% endif %}";
        assert_eq!(render(source, "hello").expect("a text"), "<s>\nSYSTEMA:");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let source = "{{ messages[1] | tojson }}";
        assert_eq!(render(source, "<a> & \"b\"").expect("a text"), r#"{"role": "user", "content": "<a> & \"b\""}"#);
    }

    #[test]
    fn generation_tags_have_no_effect() {
        let source = "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration %};{% endfor %}";
        assert_eq!(render(source, "x").expect("a text"), "system;user;");
    }

    #[test]
    fn a_template_that_refuses_its_messages_says_so_in_its_own_words() {
        let source =
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
        let error = render(source, "x").expect_err("an error");
        assert!(matches!(&error, ChatError::Refused(_)), "{error}");
        assert!(error.to_string().contains("System role not supported"), "{error}");
    }

    #[test]
    fn todays_date_is_not_given_out() {
        let guarded = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}";
        assert_eq!(render(guarded, "x").expect("a text"), "26 Jul 2024");
        assert!(matches!(render("{{ strftime_now('%d') }}", "x"), Err(ChatError::Clock)));
    }

    #[test]
    fn templates_that_never_end_or_grow_without_bound_are_stopped() {
        let mut failed = Vec::new();
        for source in [
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x * 9 %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x.replace('a', 'aab') %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x | replace('a', 'aab') %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = '%s%s' | format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = '{}{}'.format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=['ab']) %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=['ab']) %}{% for a in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x='ab\n') %}{% for a in range(64) %}{% set ns.x = ns.x | indent(99999999, true) %}{% endfor %}{{ ns.x }}",
            "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
            "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}{% endmacro %}{{ m(0) }}",
            "{% for a in range(100000) %}{{ '%0999999d' | format(1) }}{% endfor %}",
            "{{ '%0999999999d' | format(1) }}",
            "{{ '{:>999999999}'.format('x') }}",
            "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
            "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
            "{% for a in range(100000) %}{{ messages | tojson }}{% for b in range(100) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
            "{% if %}",
            "{{ 'x' * 99999999999 }}",
            "{{ range(99999999999) | list | length }}",
        ] {
            if !matches!(render(source, "x"), Err(ChatError::Template(_))) {
                failed.push(source);
            }
        }
        assert!(failed.is_empty(), "{failed:#?}");
        // A nest too deep for the parser.
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
        assert!(matches!(render(&deep, "x"), Err(ChatError::Template(_))));
        let deep = "{% if true %}".repeat(100_000) + &"{% endif %}".repeat(100_000);
        assert!(matches!(render(&deep, "x"), Err(ChatError::Template(_))));
    }

    #[test]
    fn a_template_may_copy_long_messages_as_usual_ones_do() {
        let source = "{% for m in messages %}{% set content = m.content | trim %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
                      {{ '<|' ~ m.role ~ '|>' + content.strip() + '<|end|>' }}{% endfor %}";
        let content = "x ".repeat(4 << 20);
        assert_eq!(
            render(source, &content).expect("a text").len(),
            content.len() - 1 + "<|system|>Be brief.<|end|><|user|><|end|>".len()
        );
    }
}
