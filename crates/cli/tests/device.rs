//! `--device` and `infall devices`, on Mesa's software Vulkan.

mod common;

use std::path::Path;

use common::{Ran, finish, infall, run, tiny};
use serde_json::Value;

fn devices(further: &[&str]) -> Vec<Value> {
    let found = run(&[&["devices", "--json"], further].concat()).success();
    let found: Value = serde_json::from_slice(&found).unwrap();
    found["devices"].as_array().unwrap().clone()
}

/// `gpu:N` of the software adapter, which scripts/test installs.
fn software() -> String {
    let all = devices(&[]);
    let found = all.iter().find(|device| device["kind"] == "software");
    found.expect("mesa-vulkan-drivers is installed")["device"].as_str().unwrap().to_owned()
}

fn text(ran: Ran) -> String {
    String::from_utf8(ran.success()).unwrap()
}

#[test]
fn adapters_are_listed_and_measured() {
    let all = devices(&[]);
    let found = all.iter().find(|device| device["kind"] == "software").expect("mesa-vulkan-drivers is installed");
    assert_eq!(found["api"], "vulkan");
    assert_eq!(found["unified"], true);
    assert_eq!(found["lacks"].as_array().unwrap().len(), 0, "{found}");
    assert!(found["total_bytes"].as_u64().unwrap() >= 1 << 30, "{found}");
    assert!(found["binding_bytes"].as_u64().unwrap() >= 128 << 20, "{found}");
    let measured = devices(&["--measure"]);
    for device in measured.iter().filter(|device| device["lacks"].as_array().unwrap().is_empty()) {
        for rate in ["read_bytes_per_second", "upload_bytes_per_second"] {
            assert!(device[rate].as_f64().unwrap() > 1e7, "{device}");
        }
    }
    let table = text(run(&["devices"]));
    for part in [&software(), "can be used", "largest binding", "used only by its number", "--device auto takes"] {
        assert!(table.contains(part), "{part} in\n{table}");
    }
}

/// wgpu can be asked to read these; it is not.
#[test]
fn environment_variables_change_nothing() {
    let with =
        |name: &str, value: &str| finish(infall(&["devices", "--json"]).env(name, value).spawn().unwrap()).success();
    let expected = with("INFALL_NOTHING", "1");
    for (name, value) in [
        ("WGPU_BACKEND", "gl"),
        ("WGPU_ADAPTER_NAME", "nothing"),
        ("WGPU_POWER_PREF", "low"),
        ("WGPU_VALIDATION", "1"),
        ("WGPU_DEBUG", "1"),
        ("WGPU_ALLOW_UNDERLYING_NONCOMPLIANT_ADAPTER", "1"),
    ] {
        assert!(with(name, value) == expected, "{name}={value}");
    }
}

#[test]
fn nano_says_the_same_on_every_device() {
    let device = software();
    let asked = |further: &[&str]| {
        let args = ["run", "What is 2+2?", "--nothink", "-n", "16", "--temp", "0", "--exact", "--ctx", "512"];
        run(&[&args, further].concat())
    };
    let expected = text(asked(&[]));
    assert!(!expected.trim().is_empty());
    let resident = asked(&["--device", &device]);
    assert!(resident.err.contains("experts resident") && resident.err.contains("device gpu"), "{}", resident.err);
    assert_eq!(text(resident), expected);
    let streamed = asked(&["--device", &device, "--cache", "8", "--stats"]);
    for part in ["slots for 8 of 35", "filled from a host tier with slots for 4 of 35", "device ", "host "] {
        assert!(streamed.err.contains(part), "{part} in\n{}", streamed.err);
    }
    assert_eq!(text(streamed), expected);
    // On its own, a model that is part of the program stays on the processor and says nothing of it.
    let automatic = asked(&["--device", "auto"]);
    assert!(!automatic.err.contains("device"), "{}", automatic.err);
    assert_eq!(text(automatic), expected);
}

#[test]
fn logits_do_not_depend_on_slots_and_both_tiers_are_counted() {
    let (device, model, dir) = (software(), tiny("tiny-iq2"), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (tokens, stats) = (path("tokens.json"), path("stats.json"));
    std::fs::write(&tokens, serde_json::to_vec(&(0..20).map(|i| (i * 37 + 11) % 200).collect::<Vec<u32>>()).unwrap())
        .unwrap();
    let logits = |name: &str, further: &[&str]| {
        let out = path(name);
        let model = model.to_str().unwrap();
        let args = ["logits", "-m", model, "--tokens", &tokens, "--out", &out, "--device", &device];
        run(&[&args, further].concat()).success();
        std::fs::read(out).unwrap()
    };
    let resident = logits("resident", &[]);
    let streamed = logits("streamed", &["--cache", "2", "--chunk", "7", "--exact", "--stats-json", &stats]);
    assert_eq!(streamed.len(), resident.len());
    assert!(streamed == logits("exact", &["--chunk", "7", "--exact"]));
    let found: Value = serde_json::from_slice(&std::fs::read(stats).unwrap()).unwrap();
    let (setting, prefill) = (&found["setting"], &found["prefill"]);
    assert_eq!(setting["slots"]["slots"], 2);
    assert_eq!(setting["host_tier"]["of_experts"], 40);
    let number = |value: &Value| value.as_u64().unwrap();
    assert_eq!(
        number(&prefill["misses"]),
        number(&prefill["host_tier"]["hits"]) + number(&prefill["host_tier"]["misses"])
    );
    assert!(number(&prefill["uploaded_bytes"]) > number(&prefill["read_bytes"]) && number(&prefill["read_bytes"]) > 0);
}

#[test]
fn a_plan_of_a_device_keeps_to_its_memory_and_names_what_works() {
    let (device, model) = (software(), tiny("tiny-iq2"));
    let plan = |further: &[&str]| {
        let args = ["plan", "-m", model.to_str().unwrap(), "--device", &device, "--json"];
        run(&[&args, further].concat())
    };
    let object = |ran: Ran| -> Value { serde_json::from_slice(&ran.success()).unwrap() };
    let whole = object(plan(&[]));
    assert_eq!(whole["residency"], "resident");
    assert!(whole["device"].as_str().unwrap().starts_with("gpu "), "{whole}");
    let sum: u64 = whole["items"].as_array().unwrap().iter().map(|item| item["bytes"].as_u64().unwrap()).sum();
    let total = whole["total_bytes"].as_u64().unwrap();
    assert_eq!(sum, total);
    let less = object(plan(&["--gpu-memory", &(total - 1).to_string()]));
    assert_eq!(less["residency"], "streamed");
    assert!(less["total_bytes"].as_u64().unwrap() < total, "{less}");
    assert!(less["host_tier"]["slots"].as_u64().unwrap() > 0, "{less}");
    let refused = plan(&["--gpu-memory", "300MiB"]);
    assert_eq!(refused.code, Some(1));
    let smallest = refused.err.split("Allow at least ").nth(1).unwrap().split(' ').next().unwrap();
    let fewest = object(plan(&["--gpu-memory", smallest]));
    assert_eq!(fewest["items"][4]["slots"], 1, "{fewest}");
    let smaller = (smallest.parse::<u64>().unwrap() - 1).to_string();
    assert_eq!(plan(&["--gpu-memory", &smaller]).code, Some(1));
    // One memory: the other flag limits it, too.
    assert_eq!(plan(&["--memory", &smaller]).code, Some(1));
    let table = text(run(&["plan", "-m", model.to_str().unwrap(), "--device", &device, "--cache", "3"]));
    assert!(table.contains("memory of gpu ") && table.contains("3 slots for 40 experts"), "{table}");
}

#[test]
fn what_cannot_be_had_is_refused_with_what_there_is() {
    let model = tiny("tiny-iq2");
    let error = |further: &[&str], code: i32| {
        let ran = run(&[&["plan", "-m", model.to_str().unwrap()], further].concat());
        assert_eq!(ran.code, Some(code), "{}", ran.err);
        ran.err
    };
    let unknown = error(&["--device", "gpu:99"], 1);
    assert!(unknown.contains("found no gpu:99") && unknown.contains(&software()), "{unknown}");
    assert!(error(&["--device", "cuda"], 2).contains("expected auto, cpu, gpu, or gpu:N"));
    assert!(error(&["--device", "cpu", "--gpu-memory", "1GiB"], 1).contains("the cpu has --memory"));
    if devices(&[]).iter().any(|device| device["kind"] != "software") {
        println!(
            "skipped: that no GPU is told of, and that a software adapter is not taken for `gpu`; this machine has a hardware GPU"
        );
    } else {
        let limited = run(&["plan", "-m", model.to_str().unwrap(), "--gpu-memory", "1GiB"]);
        assert!(limited.err.contains("device: cpu: no GPU was found for --gpu-memory"), "{}", limited.err);
        let none = error(&["--device", "gpu"], 1);
        assert!(none.contains("no hardware GPU") && none.contains("used only by its number"), "{none}");
    }
    let flash = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-data/full/flash.header");
    let ran = run(&["plan", "-m", flash.to_str().unwrap(), "--ctx", "4096", "--device", &software()]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("lets a kernel reach") && ran.err.contains("--device cpu"), "{}", ran.err);
}
