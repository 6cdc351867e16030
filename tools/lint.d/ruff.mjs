// Ruff as WebAssembly: node ruff.mjs PACKAGE_FOLDER FILE... with [tool.ruff] as JSON on standard
// input. The findings of its rules, and the files that its formatter would write differently, or,
// with FIX=1, now writes.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, ...files] = process.argv.slice(2);
const ruff = createRequire(resolve(folder, "package.json"))("@astral-sh/ruff-wasm-nodejs");
const workspace = new ruff.Workspace(JSON.parse(readFileSync(0, "utf8")), ruff.PositionEncoding.Utf32);

for (const file of files) {
  const text = readFileSync(file, "utf8");
  const findings = workspace.check(text);
  for (const { start_location: at, code, message } of findings)
    report(`${file}:${at.row}:${at.column}: ${code} ${message}`);
  if (findings.every(({ code }) => code !== "invalid-syntax")) format(file, text, workspace.format(text));
}

function format(file, text, wanted) {
  if (text === wanted) return;
  if (process.env.FIX) return writeFileSync(file, wanted);
  const [is, shall] = [text.split("\n"), wanted.split("\n")];
  let line = 0;
  while (is[line] === shall[line]) line++;
  report(`${file}:${line + 1}: ruff format writes this otherwise (make lint FIX=1 does)`);
}

function report(line) {
  console.log(line);
  process.exitCode = 1;
}
