"""The looks of the report: light or dark as the reader's system is."""

CSS = """
:root {
  color-scheme: light dark;
  --text: #1f2937; --soft: #5b6472; --line: #d8dde5; --page: #ffffff;
  --panel: #f5f7fa; --link: #0b5cad;
  --supported: #0a6b4d; --not-supported: #a8430b; --not-testable: #5b6472;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e5e9f0; --soft: #a7b0bf; --line: #3a4352; --page: #14181f;
    --panel: #1d232d; --link: #7db8f2;
    --supported: #4cc79b; --not-supported: #f29a63; --not-testable: #a7b0bf;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 17px/1.55 system-ui, -apple-system, 'Segoe UI', sans-serif;
}
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0 .6rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .4rem; }
p { margin: .5rem 0; }
a { color: var(--link); }
nav { margin: 1rem 0; font-size: .95rem; }
nav a { margin-right: 1.1rem; display: inline-block; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.finding {
  border: 1px solid var(--line); border-left: .4rem solid var(--verdict);
  border-radius: .4rem; padding: .7rem 1rem; margin: .8rem 0;
  background: var(--panel);
}
.supported { --verdict: var(--supported); }
.not-supported { --verdict: var(--not-supported); }
.not-testable { --verdict: var(--not-testable); }
.finding h3 { margin: 0; }
.badge {
  color: var(--verdict); font-weight: 700; white-space: nowrap;
}
figure { margin: .8rem 0 0; }
figure div { overflow-x: auto; }
figure img {
  display: block; width: 100%; min-width: 30rem; height: auto;
  background: #fff; border-radius: .4rem; padding: .3rem;
}
figcaption { margin-top: .4rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; }
th, td {
  padding: .28rem .65rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; white-space: nowrap;
}
th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.words { white-space: normal; min-width: 14rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
pre {
  overflow-x: auto; padding: .8rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; font-size: .82rem;
  line-height: 1.4;
}
@media (max-width: 40rem) {
  body { font-size: 16px; }
  h1 { font-size: 1.5rem; }
  main { padding: .6rem .8rem 3rem; }
}
"""
