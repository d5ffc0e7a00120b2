#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exproto_sidecar::fuzzing::acl_rules(bytes));
