//! GGUF files against what the gguf package and the models' own tokenizers give (tests/fixtures/gguf/make.py), and files that lie.

use labpipe::gguf::{GGML_TYPES, GgufError, GgufFile, MetaValue, tokenizer_config, tokenizer_json};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn expected(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture("expected.json")).expect("the fixture");
    serde_json::from_str::<Value>(&text).expect("JSON")[name].clone()
}

fn open(name: &str) -> GgufFile {
    GgufFile::open(&fixture(name)).expect("a GGUF file")
}

#[test]
fn every_block_type_gives_the_values_of_the_gguf_package_bit_for_bit() {
    let file = open("types.gguf");
    let mut n_types = 0;
    for ty in GGML_TYPES.iter().filter(|ty| ty.is_readable() && ty.dtype.is_none()) {
        let tensor = file.tensor(ty.name).unwrap_or_else(|| panic!("the fixture has no {}", ty.name));
        let values = file.values(ty.name, tensor, &|row| row).expect("values");
        let stored = file.tensor(&format!("{}.expected", ty.name)).expect("what is expected");
        let stored = file.bytes(stored);
        let expected: Vec<u32> = stored.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        assert_eq!(values.len(), 512, "{}", ty.name);
        assert!(values.iter().any(|value| *value != 0.0));
        assert!(values.iter().map(|value| value.to_bits()).eq(expected.iter().copied()), "{} differs", ty.name);
        let swapped = file.values(ty.name, tensor, &|row| 1 - row).expect("values");
        assert_eq!((&swapped[..256], &swapped[256..]), (&values[256..], &values[..256]));
        n_types += 1;
    }
    assert_eq!(n_types, 9, "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL");
}

#[test]
fn a_type_that_is_not_read_is_named_with_those_that_are() {
    let file = open("types.gguf");
    let error = file.values("Q2_K", file.tensor("Q2_K").expect("the tensor"), &|row| row).expect_err("an error");
    assert!(matches!(error, GgufError::Tensor { .. }));
    assert!(error.to_string().contains("Q2_K holds no blocks") && error.to_string().contains("Q4_K"), "{error}");
}

#[test]
fn metadata_of_every_kind_is_read() {
    let file = open("types.gguf");
    for (key, expected) in [("uint8", 7), ("uint16", 700), ("uint32", 70_000), ("uint64", 1 << 40)] {
        assert_eq!(file.get(&format!("test.{key}")), Some(&MetaValue::Unsigned(expected)), "{key}");
    }
    for (key, expected) in [("int8", -7), ("int16", -700), ("int32", -70_000), ("int64", -(1 << 40))] {
        assert_eq!(file.get(&format!("test.{key}")), Some(&MetaValue::Signed(expected)), "{key}");
    }
    assert_eq!(file.get("test.float32"), Some(&MetaValue::Float(f64::from(0.1f32))));
    assert_eq!(file.get("test.float64"), Some(&MetaValue::Float(0.1)));
    assert_eq!(file.get("test.bool"), Some(&MetaValue::Bool(true)));
    assert_eq!(file.text("test.string"), Some("grüße"));
    assert_eq!(file.texts("test.strings").expect("texts"), Some(vec!["a", "", "ß"]));
    let numbers = file.numbers("test.numbers").expect("numbers").expect("an array");
    assert_eq!(numbers, [MetaValue::Signed(1), MetaValue::Signed(-2), MetaValue::Signed(3)]);
    assert!(file.texts("test.numbers").is_err() && file.numbers("test.bool").is_err());
    assert_eq!(file.texts("nothing").expect("no error"), None);
}

fn tokenizer(file: &GgufFile) -> Tokenizer {
    Tokenizer::from_bytes(tokenizer_json(file).expect("a tokenizer")).expect("a tokenizer that loads")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn byte_level_tokenizers_cut_words_as_the_models_own_do() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let name = format!("vocab-{pre}");
        let (expected, tokenizer) = (expected(&name), tokenizer(&open(&format!("{name}.gguf"))));
        let text = expected["text"].as_str().expect("a text");
        let found = tokenizer.encode(text, false).expect("tokens");
        assert_eq!(found.get_ids(), ids(&expected["text_ids"]), "{pre}");
        // Qwen2 composes its text; this one is composed already.
        assert_eq!(tokenizer.decode(found.get_ids(), false).expect("a text"), text, "{pre}");
        let special = tokenizer.encode("a<|end|>b", false).expect("tokens");
        assert!(special.get_tokens().contains(&"<|end|>".to_owned()));
    }
}

#[test]
fn llama_3_puts_bos_before_a_text_and_the_others_do_not() {
    for (pre, adds) in [("gpt-2", false), ("smollm", false), ("llama-bpe", true), ("qwen2", false)] {
        let encoding = tokenizer(&open(&format!("vocab-{pre}.gguf"))).encode("Once", true).expect("tokens");
        assert_eq!(encoding.get_tokens()[0] == "<|bos|>", adds, "{pre}");
        assert_eq!(encoding.get_special_tokens_mask()[0] == 1, adds, "{pre}");
    }
}

#[test]
fn a_sentence_piece_vocabulary_gives_the_ids_of_the_models_own_tokenizer() {
    let from_gguf = tokenizer(&open("llama-mixed.gguf"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = Tokenizer::from_file(root.join("models/stories260k/tokenizer.json")).expect("the model's own");
    let expected = expected("llama-mixed");
    let text = expected["text"].as_str().expect("a text");
    assert_eq!(from_gguf.encode(text, true).expect("tokens").get_ids(), ids(&expected["text_ids"]));
    for file in ["experiments/data/tinystories.txt", "experiments/data/wikitext2-head.txt"] {
        let text: String = std::fs::read_to_string(root.join(file)).expect("a text").chars().take(20_000).collect();
        let (found, own) = (from_gguf.encode(text.as_str(), true), own.encode(text.as_str(), true));
        let (found, own) = (found.expect("tokens"), own.expect("tokens"));
        assert_eq!(found.get_ids(), own.get_ids(), "{file}");
        assert_eq!(from_gguf.decode(found.get_ids(), true).expect("a text"), text, "{file}");
    }
}

/// Full-size tokenizers, where they are at hand: `LABPIPE_GGUF_TOKENIZERS` names a folder with pairs of NAME.gguf (made from it, with
/// its vocabulary and merges) and NAME.json (the model's own tokenizer.json), and a text, text.txt.
#[test]
fn full_vocabularies_agree_with_the_models_own_tokenizers() {
    let Some(dir) = std::env::var_os("LABPIPE_GGUF_TOKENIZERS").map(PathBuf::from) else { return };
    let text = std::fs::read_to_string(dir.join("text.txt")).expect("a text");
    let mut n = 0;
    for entry in std::fs::read_dir(&dir).expect("the folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "gguf") {
            let own = Tokenizer::from_file(path.with_extension("json")).expect("the model's own tokenizer");
            let found = tokenizer(&GgufFile::open(&path).expect("a GGUF file"));
            let (found, own) = (found.encode(text.as_str(), false), own.encode(text.as_str(), false));
            assert_eq!(found.expect("tokens").get_ids(), own.expect("tokens").get_ids(), "{}", path.display());
            n += 1;
        }
    }
    assert!(n > 0, "the folder has pairs");
}

/// A GGUF file put together byte by byte.
#[derive(Default)]
struct Forged {
    pairs: Vec<u8>,
    n_pairs: u64,
    tensors: Vec<u8>,
    n_tensors: u64,
}

impl Forged {
    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn pair(mut self, key: &str, value_type: u32, value: &[u8]) -> Forged {
        self.pairs.extend([Forged::text(key).as_slice(), &value_type.to_le_bytes(), value].concat());
        self.n_pairs += 1;
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Forged {
        self.tensors.extend(Forged::text(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        self.tensors.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.tensors.extend(ty.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.n_tensors += 1;
        self
    }

    fn bytes(&self, n_data: usize) -> Vec<u8> {
        let mut bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
        bytes.extend([self.n_tensors.to_le_bytes(), self.n_pairs.to_le_bytes()].concat());
        bytes.extend([self.pairs.as_slice(), &self.tensors].concat());
        bytes.resize(bytes.len().next_multiple_of(32) + n_data, 0);
        bytes
    }
}

#[test]
fn a_file_names_bos_eos_and_a_chat_template_where_it_has_them() {
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    const U32: u32 = 4;
    let tokens = ["<s>", "</s>", "a"].map(Forged::text).concat();
    let tokens = [TEXT.to_le_bytes().as_slice(), &3u64.to_le_bytes(), &tokens].concat();
    let forged = |eos: u32| {
        Forged::default()
            .pair("tokenizer.ggml.tokens", ARRAY, &tokens)
            .pair("tokenizer.ggml.bos_token_id", U32, &0u32.to_le_bytes())
            .pair("tokenizer.ggml.eos_token_id", U32, &eos.to_le_bytes())
            .pair("tokenizer.chat_template", TEXT, &Forged::text("{{ bos_token }}"))
            .tensor("a", &[32, 2], 0, 0)
            .bytes(256)
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("a.gguf");
    for (eos, expected) in [(1, Some("</s>")), (u32::MAX, None)] {
        std::fs::write(&path, forged(eos)).expect("a file");
        let config = tokenizer_config(&GgufFile::open(&path).expect("a GGUF file")).expect("a config");
        assert_eq!(config["bos_token"].as_str(), Some("<s>"));
        assert_eq!(config["eos_token"].as_str(), expected);
        assert_eq!(config["chat_template"].as_str(), Some("{{ bos_token }}"));
    }
}

/// A SentencePiece file of six tokens.
fn tiny_sentence_piece(name: &str, prefixes: bool) -> Tokenizer {
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    let tokens = ["<unk>", "<s>", "<|user|>", "\u{2581}", "a", "\u{2581}a", "\n"];
    // 3: control; 1: normal.
    let types = [2i32, 3, 3, 1, 1, 1, 1];
    let scores = [0.0f32, 0.0, 0.0, -3.0, -2.0, -1.0, -4.0];
    let array = |item_type: u32, items: Vec<u8>| {
        [item_type.to_le_bytes().as_slice(), &(tokens.len() as u64).to_le_bytes(), &items].concat()
    };
    let bytes = Forged::default()
        .pair("general.name", TEXT, &Forged::text(name))
        .pair("tokenizer.ggml.model", TEXT, &Forged::text("llama"))
        .pair("tokenizer.ggml.tokens", ARRAY, &array(TEXT, tokens.map(Forged::text).concat()))
        .pair("tokenizer.ggml.token_type", ARRAY, &array(5, types.iter().flat_map(|n| n.to_le_bytes()).collect()))
        .pair("tokenizer.ggml.scores", ARRAY, &array(6, scores.iter().flat_map(|n| n.to_le_bytes()).collect()))
        .pair("tokenizer.ggml.add_space_prefix", 7, &[u8::from(prefixes)])
        .tensor("a", &[32, 2], 0, 0)
        .bytes(256);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("a.gguf");
    std::fs::write(&path, bytes).expect("a file");
    tokenizer(&GgufFile::open(&path).expect("a GGUF file"))
}

#[test]
fn special_tokens_of_phi_3_take_the_white_space_behind_them() {
    let ids = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text, false).expect("tokens").get_ids().to_vec();
    let (phi, other) = (tiny_sentence_piece("Phi-3 mini", true), tiny_sentence_piece("another", true));
    assert_eq!(ids(&phi, "<|user|>\na"), [2, 5]);
    assert_eq!(ids(&other, "<|user|>\na"), [2, 3, 6, 4]);
    assert_eq!(ids(&phi, "<s>\na"), [1, 3, 6, 4], "<s> takes none");
}

#[test]
fn a_space_is_put_before_a_text_unless_the_file_says_no() {
    for (prefixes, expected) in [(true, vec!["\u{2581}a"]), (false, vec!["a"])] {
        let encoding = tiny_sentence_piece("gemma", prefixes).encode("a", false).expect("tokens");
        assert_eq!(encoding.get_tokens(), expected);
    }
}

#[track_caller]
fn refused(bytes: &[u8], expected: &str) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("lying.gguf");
    std::fs::write(&path, bytes).expect("a file");
    let error = GgufFile::open(&path).expect_err(expected).to_string();
    assert!(error.contains("lying.gguf") && error.contains(expected), "expected {expected:?} in {error}");
}

#[test]
fn headers_that_lie_are_refused() {
    let tensor = || Forged::default().tensor("a", &[32, 2], 0, 0);
    let whole = tensor().bytes(256);
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("a.gguf"), &whole).expect("a file");
    GgufFile::open(&dir.path().join("a.gguf")).expect("what is not damaged opens");
    let patched = |at: usize, patch: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    };
    refused(b"", "the file is empty");
    refused(b"GGU", "no GGUF file");
    refused(b"GGUF", "cut short");
    refused(&whole[..20], "cut short");
    refused(&whole[..whole.len() - 1], "cut short");
    refused(&patched(4, &1u32.to_le_bytes()), "version 1");
    refused(&patched(4, &3u32.to_be_bytes()), "big-endian");
    refused(&patched(4, &77u32.to_le_bytes()), "version 77");
    refused(&patched(8, &u64::MAX.to_le_bytes()), "claims 18446744073709551615 tensors");
    refused(&patched(8, &1_000u64.to_le_bytes()), "claims 1000 tensors");
    refused(&patched(16, &(1u64 << 40).to_le_bytes()), "metadata pairs");
    refused(&Forged::default().tensor("a", &[], 0, 0).bytes(64), "0 dimensions");
    refused(&Forged::default().tensor("a", &[1; 9], 0, 0).bytes(64), "9 dimensions");
    refused(&Forged::default().tensor("a", &[32, 0], 0, 0).bytes(64), "zero or absurd");
    refused(&Forged::default().tensor("a", &[1 << 62, 1 << 62], 0, 0).bytes(64), "absurd");
    refused(&Forged::default().tensor("a", &[1 << 40], 0, 0).bytes(64), "ends at byte");
    refused(&Forged::default().tensor("a", &[32], 0, u64::MAX - 31).bytes(64), "absurd");
    refused(&Forged::default().tensor("a", &[32], 0, 1 << 40).bytes(64), "ends at byte");
    refused(&Forged::default().tensor("a", &[32], 0, 4).bytes(256), "no multiple of 32");
    refused(&Forged::default().tensor("a", &[32], 999, 0).bytes(256), "element type 999");
    refused(&Forged::default().tensor("a", &[33], 2, 0).bytes(256), "no whole blocks");
    refused(&tensor().tensor("b", &[32], 0, 128).bytes(256), "it overlaps a");
    refused(&tensor().tensor("a", &[32], 0, 256).bytes(512), "it is there twice");
    for name in ["../../etc/passwd", "a/b", "a\\b", "", "a\nb"] {
        refused(&Forged::default().tensor(name, &[32], 0, 0).bytes(256), "no tensor has such a name");
    }
}

#[test]
fn metadata_that_lies_is_refused() {
    let pair = |value_type: u32, value: &[u8]| Forged::default().pair("k", value_type, value).bytes(64);
    let array = |item_type: u32, n: u64, rest: &[u8]| {
        pair(9, &[item_type.to_le_bytes().as_slice(), &n.to_le_bytes(), rest].concat())
    };
    refused(&pair(99, &[0; 8]), "metadata k: its type 99");
    refused(&pair(7, &[3]), "0 or 1, not 3");
    refused(&pair(8, &u64::MAX.to_le_bytes()), "claims 18446744073709551615 bytes");
    refused(&pair(8, &(1u64 << 20).to_le_bytes()), "the file ends");
    refused(&pair(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "not UTF-8");
    refused(&array(4, u64::MAX, &[]), "more than the file has room for");
    refused(&array(0, 1 << 30, &[]), "more than the file has room for");
    refused(&array(8, 2, &u64::MAX.to_le_bytes()), "the file ends");
    refused(&array(9, 1, &[0; 16]), "array of arrays");
    refused(&array(98, 1, &[0; 16]), "type 98");
    refused(&Forged::default().pair("k", 0, &[1]).pair("k", 0, &[2]).bytes(64), "it is there twice");
    for alignment in [0u32, 3, 1 << 30] {
        let forged = Forged::default().pair("general.alignment", 4, &alignment.to_le_bytes());
        refused(&forged.tensor("a", &[32], 0, 0).bytes(256), "no power of two");
    }
}
