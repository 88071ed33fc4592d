//! Against what transformers makes of the same files (tests/fixtures/tokenizers/README.md says how it was asked).

use super::*;
use crate::event::NullProgress;
use serde_json::json;

const P: &NullProgress = &NullProgress;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn own() -> PathBuf {
    root().join("tests/fixtures/tokenizers/bytes-512")
}

fn fixture(name: &str) -> Value {
    let text = std::fs::read_to_string(root().join("tests/fixtures/tokenizers").join(name)).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn load(dir: &Path) -> ModelTokenizer {
    ModelTokenizer::load(dir).expect("a tokenizer")
}

fn encoded(tokenizer: &ModelTokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, P).expect("tokens").ids
}

fn messages(chat: &Value) -> Vec<Message> {
    let message = |item: &Value| Message {
        role: if item["role"] == "system" { "system" } else { "user" },
        content: item["content"].as_str().expect("a text").to_owned(),
    };
    list(chat).iter().map(message).collect()
}

fn check(name: &str, tokenizer: &ModelTokenizer, expected: &Value, case: &Value) {
    for (text, found) in list(&expected["texts"]).iter().zip(list(&case["ids"])) {
        let text = text.as_str().expect("a text");
        assert_eq!(encoded(tokenizer, text), ids(found), "{name}: {text:?}");
    }
    for (chat, found) in list(&expected["chats"]).iter().zip(list(&case["chat_ids"])) {
        let text = tokenizer.chat(messages(chat), P).expect("a text");
        assert_eq!(tokenizer.encode_as_is(&text, P).expect("tokens").ids, ids(found), "{name}: {text:?}");
    }
}

/// Every text comes back as it was, but for what a tokenizer that begins words with a space does to leading ones.
fn check_round_trip(name: &str, tokenizer: &ModelTokenizer, expected: &Value) {
    for text in list(&expected["texts"]).iter().map(|text| text.as_str().expect("a text")) {
        let has_special = text.contains("<|");
        let back = tokenizer.steps.tokenizer().decode(&encoded(tokenizer, text), !has_special).expect("a text");
        let bos = tokenizer.names.get("bos_token").map_or("", String::as_str);
        let back = if has_special { back.strip_prefix(bos).unwrap_or(&back) } else { &back };
        assert_eq!(back, text, "{name}");
    }
}

#[test]
fn texts_and_chats_are_those_of_transformers() {
    let expected = fixture("expected.json");
    check("bytes-512", &load(&own()), &expected, &expected["own"]);
    check_round_trip("bytes-512", &load(&own()), &expected);
}

#[test]
fn a_bos_is_told_apart_from_a_text_that_has_none() {
    let tokenizer = load(&own());
    assert_eq!(tokenizer.encode("a", P).expect("tokens").bos_id, Some(0));
    let chat = tokenizer.chat(vec![Message { role: "user", content: "a".to_owned() }], P).expect("a text");
    assert_eq!(tokenizer.encode_as_is(&chat, P).expect("tokens").bos_id, Some(0));
    assert_eq!(tokenizer.encode_as_is("a", P).expect("tokens").bos_id, None);
}

#[test]
fn sentencepiece_style_tokenizers_agree_with_transformers() {
    let expected = fixture("expected.json");
    for name in ["stories260k", "tinystories-656k"] {
        check(name, &load(&root().join("models").join(name)), &expected, &expected["others"][name]);
    }
}

/// Their files are not ours to copy: the test needs them beside the checkout.
#[test]
fn tokenizers_of_llama_3_qwen_2_5_and_gpt_2_agree_with_transformers_and_round_trip() {
    let expected = fixture("expected.json");
    for name in ["gpt2", "llama3_nobos", "qwen2_5"] {
        let dir = root().join("../shared/tokenizers").join(name);
        if !dir.is_dir() {
            eprintln!("skipped: {} is not there", dir.display());
            continue;
        }
        let tokenizer = load(&dir);
        check(name, &tokenizer, &expected, &expected["others"][name]);
        check_round_trip(name, &tokenizer, &expected);
        let warnings: Vec<String> = tokenizer.account.iter().flat_map(AccountPart::all_warnings).collect();
        assert!(warnings.is_empty(), "{name}: {warnings:?}");
    }
}

/// A model folder of tokenizer files alone, changed as a row of a fixture says.
fn folder(dir: &Path, row: &Value, config: &[(&str, Value)], model_type: &str) {
    let base = match row["base"].as_str() {
        Some("bytes-512") => own(),
        _ => root().join("models/stories260k"),
    };
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(base.join(name)).expect("the file")).expect("JSON")
    };
    let write = |name: &str, value: &Value| std::fs::write(dir.join(name), value.to_string()).expect("a file");
    let mut tokenizer = read("tokenizer.json");
    if row["post_processor"] == false {
        tokenizer["post_processor"] = Value::Null;
    }
    write("tokenizer.json", &tokenizer);
    let mut settings = read("tokenizer_config.json");
    let fields = settings.as_object_mut().expect("a mapping");
    for (name, value) in config {
        fields.shift_remove(*name);
        match value.as_str() {
            Some("absent") => {}
            Some("null") => _ = fields.insert((*name).to_owned(), Value::Null),
            _ => _ = fields.insert((*name).to_owned(), value.clone()),
        }
    }
    write("tokenizer_config.json", &settings);
    write("config.json", &json!({ "model_type": model_type }));
    for (name, content) in row["files"].as_object().into_iter().flatten() {
        write(name, content);
    }
}

/// bos.json: every class, flag and post-processor. Where 4.57 differs, the account says so, and nowhere else.
#[test]
fn what_is_put_around_a_text_is_what_transformers_puts_there() {
    let (mut n, mut n_told) = (0, 0);
    for row in list(&fixture("bos.json")["rows"]) {
        if !row["error"].is_null() {
            continue;
        }
        let flag = |name: &str| if row[name].is_null() { json!("null") } else { row[name].clone() };
        let class = if row["tokenizer_class"].is_null() { json!("absent") } else { row["tokenizer_class"].clone() };
        let config = [
            ("tokenizer_class", class),
            ("add_bos_token", flag("add_bos_token")),
            ("add_eos_token", flag("add_eos_token")),
        ];
        let dir = tempfile::tempdir().expect("a temporary folder");
        folder(dir.path(), row, &config, row["model_type"].as_str().expect("a model type"));
        let tokenizer = load(dir.path());
        let around = AroundText { before: ids(&row["before"]), behind: ids(&row["behind"]) };
        assert_eq!(tokenizer.around, around, "{row}");
        let inner = tokenizer.encode_as_is("Once", P).expect("tokens").ids;
        assert_eq!(
            encoded(&tokenizer, "Once"),
            [around.before.clone(), inner, around.behind.clone()].concat(),
            "{row}"
        );
        let told =
            tokenizer.account.iter().flat_map(AccountPart::all_warnings).any(|warning| warning.contains("4.57 gives"));
        if row["v4_57"]["error"].is_null() {
            let before = AroundText { before: ids(&row["v4_57"]["before"]), behind: ids(&row["v4_57"]["behind"]) };
            assert_eq!(told, around != before, "{row}");
        }
        n += 1;
        n_told += usize::from(told);
    }
    assert!(n > 300 && n_told > 50, "{n} rows, {n_told} told");
}

/// names.json: which file names BOS, EOS, UNK and PAD, and which tokens the files add. Rows of Llama's class compare names alone: the class
/// makes another normalizer.
#[test]
fn special_and_added_tokens_come_from_the_file_that_transformers_takes_them_from() {
    let fixture = fixture("names.json");
    let mut wrong = Vec::new();
    for row in list(&fixture["rows"]) {
        let config = row["config"].as_object().expect("a mapping");
        let config: Vec<(&str, Value)> = config
            .iter()
            .map(|(name, value)| (name.as_str(), if value.is_null() { json!("absent") } else { value.clone() }))
            .collect();
        let dir = tempfile::tempdir().expect("a temporary folder");
        folder(dir.path(), row, &config, "llama");
        let tokenizer = load(dir.path());
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let found = (json!(tokenizer.names.get(name)), json!(tokenizer.special_token_id(name)));
            if found != (row["names"][name].clone(), row["ids"][name].clone()) {
                wrong.push(format!(
                    "{}: {name} is {found:?}, not {} {}",
                    row["name"], row["names"][name], row["ids"][name]
                ));
            }
        }
        let n_tokens = tokenizer.steps.tokenizer().get_vocab_size(true);
        if row["n_tokens"] != n_tokens {
            wrong.push(format!("{}: {n_tokens} tokens, not {}", row["name"], row["n_tokens"]));
        }
        if row["texts"].is_null() || row["config"]["tokenizer_class"] == "LlamaTokenizer" {
            continue;
        }
        for (text, expected) in list(&fixture["texts"]).iter().zip(list(&row["texts"])) {
            let found = tokenizer.encode_as_is(text.as_str().expect("a text"), P).expect("tokens").ids;
            if found != ids(expected) {
                wrong.push(format!("{}: {text} is {found:?}, not {expected}", row["name"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Under a qwen2 config transformers 5.24 takes Qwen2Tokenizer, which adds its own `<|endoftext|>` with id 512 to this vocabulary of 512:
/// a model of 512 rows can't take it, one of 513 can.
#[test]
fn a_token_that_only_the_class_names_needs_a_row_of_the_model() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(root().join("models/stories260k/tokenizer.json"), dir.path().join("tokenizer.json")).expect("a copy");
    let with = |config: Value| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("a file");
        let tokenizer = load(dir.path());
        let warnings: Vec<String> = tokenizer.account.iter().flat_map(AccountPart::all_warnings).collect();
        (tokenizer.encode_as_is("<|endoftext|>", P).expect("tokens").ids, warnings.join("\n"))
    };
    let (plain, _) = with(json!({"model_type": "llama", "vocab_size": 512}));
    assert!(plain.len() > 5 && plain.iter().all(|id| *id < 512), "{plain:?}");
    for config in [
        json!({"model_type": "qwen2", "vocab_size": 512}),
        json!({"model_type": "qwen2", "text_config": {"vocab_size": 512}}),
        json!({"model_type": "qwen2", "vocab_size": 512, "tokenizer_class": "Qwen2TokenizerFast"}),
    ] {
        let (ids, warnings) = with(config);
        assert_eq!(ids, plain);
        assert!(warnings.contains("\"<|endoftext|>\" is left out") && warnings.contains("id 512"), "{warnings}");
    }
    for config in [json!({"model_type": "qwen2", "vocab_size": 513}), json!({"model_type": "qwen2"})] {
        let (ids, warnings) = with(config);
        assert_eq!(ids, [512]);
        assert!(warnings.contains("are added with id 512"), "{warnings}");
    }
    // A file that names it decides: the model is at fault, and a stage that meets the token says so.
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"pad_token": "<|endoftext|>"}"#).expect("a file");
    assert_eq!(with(json!({"model_type": "qwen2", "vocab_size": 512})).0, [512]);
}

fn copy(dir: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(own().join("tokenizer.json")).expect("the file")).expect("JSON");
    change(&mut json);
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).expect("a file");
}

#[test]
fn files_that_are_missing_or_damaged_are_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let error = |dir: &Path| ModelTokenizer::load(dir).err().expect("an error").to_string();
    assert!(error(dir.path()).contains("tokenizer.json"));
    assert!(account(dir.path())[0].warnings[0].contains("will fail to tokenize"));
    copy(dir.path(), |_| {});
    let refused = load(dir.path()).chat(Vec::new(), P).expect_err("no template").to_string();
    assert!(refused.contains("chat_template.jinja"), "{refused}");
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").expect("a file");
    assert!(error(dir.path()).contains("tokenizer_config.json"));
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"added_tokens_decoder": {"x": {}}}"#).expect("a file");
    assert!(error(dir.path()).contains("\"x\" is no token id"));
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"added_tokens_decoder": {"7": 1}}"#).expect("a file");
    assert!(error(dir.path()).contains("7 is 1"));
}

#[test]
fn tokenizers_that_inflate_or_drop_at_random_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let error = |dir: &Path| ModelTokenizer::load(dir).err().expect("an error").to_string();
    let double = json!({"type": "Replace", "pattern": {"String": "<"}, "content": "<<"});
    copy(dir.path(), |json| {
        json["normalizer"] = json!({"type": "Sequence", "normalizers": vec![double; 40]});
        json["added_tokens"][0]["normalized"] = json!(true);
    });
    let refused = error(dir.path());
    assert!(refused.contains("tokenizer.json") && refused.contains("normalizer may make"), "{refused}");
    copy(dir.path(), |json| json["model"]["dropout"] = json!(0.5));
    assert!(error(dir.path()).contains("dropout 0.5"));
    copy(dir.path(), |json| {
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        json["post_processor"]["single"] = json!(vec![text; 1000]);
    });
    assert!(error(dir.path()).contains("1000 times"));
}

#[test]
fn every_field_of_a_tokenizers_files_is_accounted_for() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy(dir.path(), |_| {});
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "model_max_length": 512, "strange": 1, "odd": false,
        "added_tokens_decoder": {"9": {"content": "<|new|>"}},
    });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).expect("a file");
    std::fs::write(dir.path().join("special_tokens_map.json"), r#"{"bos_token": "<|stop|>"}"#).expect("a file");
    std::fs::write(dir.path().join("generation_config.json"), r#"{"bos_token_id": 1}"#).expect("a file");
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "llama", "bos_token_id": 3}"#).expect("a file");
    std::fs::create_dir(dir.path().join("additional_chat_templates")).expect("a folder");
    let parts = account(dir.path());
    let of =
        |source: &str| parts.iter().find(|part| part.source == source).unwrap_or_else(|| panic!("{source}: {parts:?}"));
    let whole = of("tokenizer.json");
    assert_eq!((whole.n_used, whole.n_harmless, whole.unused.len()), (5, 4, 0));
    let config = of("tokenizer_config.json");
    assert_eq!((config.n_used, config.n_harmless, &config.unused), (3, 2, &vec!["strange".to_owned()]));
    for expected in
        ["\"<|new|>\" stand", "is token 9 here and 512", "bos_token is token 0, config.json's bos_token_id is 3"]
    {
        assert!(config.warnings.iter().any(|warning| warning.contains(expected)), "{expected}: {:?}", config.warnings);
    }
    let map = of("special_tokens_map.json");
    assert_eq!((map.n_used, map.n_harmless), (0, 1));
    assert!(map.warnings[0].contains("\"<|stop|>\" is not used"), "{:?}", map.warnings);
    assert_eq!(of("generation_config.json").n_harmless, 1);
    assert_eq!(of("chat templates").unused, ["additional_chat_templates"]);
}

#[test]
fn add_prefix_space_is_applied_and_a_class_that_would_cut_otherwise_is_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let with = |config: Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).expect("a file");
        load(dir.path())
    };
    copy(dir.path(), |_| {});
    let gpt2 = with(json!({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}));
    assert_eq!(gpt2.encode_as_is("Once", P).expect("tokens"), gpt2.encode_as_is(" Once", P).expect("tokens"));
    assert!(!gpt2.account[0].warnings.iter().any(|warning| warning.contains("makes its own")));
    copy(dir.path(), |json| {
        let steps = [json!({"type": "Digits", "individual_digits": true}), json["pre_tokenizer"].clone()];
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
    });
    let digits = with(json!({"tokenizer_class": "GPT2Tokenizer"}));
    assert!(digits.account[0].warnings[0].contains("makes its own pre_tokenizer"), "{:?}", digits.account[0]);
    // transformers 5.24 gives 340 for this model's perplexity under RobertaTokenizer, and 5.94 with the file's own steps.
    for class in ["RobertaTokenizer", "BertTokenizerFast"] {
        let other = with(json!({"tokenizer_class": class}));
        let warnings = &other.account[0].warnings;
        assert!(warnings.iter().any(|warning| warning.contains("numbers differ")), "{class}: {warnings:?}");
    }
    let unknown = with(json!({"tokenizer_class": "FooTokenizer"}));
    assert!(!unknown.account[0].warnings.iter().any(|warning| warning.contains("numbers differ")));
    let llama = root().join("models/stories260k/tokenizer.json");
    std::fs::copy(llama, dir.path().join("tokenizer.json")).expect("a copy");
    let prefixed = with(json!({"tokenizer_class": "LlamaTokenizer"})).encode_as_is("Once", P).expect("tokens").ids;
    let plain = with(json!({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false}));
    assert_ne!(plain.encode_as_is("Once", P).expect("tokens").ids, prefixed);
    assert_eq!(plain.encode_as_is(" Once", P).expect("tokens").ids, prefixed);
}

#[test]
fn chat_templates_are_found_by_name_and_named_in_errors() {
    let config =
        json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    let side = SideFiles::of_config(Path::new("tokenizer_config.json"), &config);
    assert_eq!(chat_template(&side).map(|template| template.source).as_deref(), Some("D"));
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy(dir.path(), |_| {});
    let double =
        "{% set ns = namespace(x='ab') %}{% for a in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
    std::fs::write(dir.path().join("chat_template.jinja"), double).expect("a file");
    let error = load(dir.path()).chat(Vec::new(), P).expect_err("an error").to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("fuel"), "{error}");
}
