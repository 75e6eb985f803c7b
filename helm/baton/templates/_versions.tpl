{{/* What the cluster at hand serves: before 1.24 it cannot probe over gRPC, and some kinds have older names. */}}
{{- define "baton.pdbVersion" -}}
{{- ternary "policy/v1" "policy/v1beta1" (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
{{- end -}}

{{- define "baton.hpaVersion" -}}
{{- ternary "autoscaling/v2" "autoscaling/v2beta2" (semverCompare ">=1.23-0" .Capabilities.KubeVersion.Version) -}}
{{- end -}}

{{/* Asks a process whether it answers, or whether it serves. Takes a list: root, port, service; an empty
service: whether it answers at all. */}}
{{- define "baton.probe" -}}
{{- $root := index . 0 -}}
{{- $port := index . 1 -}}
{{- $service := index . 2 -}}
{{- if semverCompare ">=1.24-0" $root.Capabilities.KubeVersion.Version -}}
grpc: {port: {{ $port }}{{ with $service }}, service: {{ . }}{{ end }}}
{{- else -}}
exec:
  command:
    - sh
    - -c
    - exec baton health --address "${BATON_HOST:-127.0.0.1}:{{ $port }}"{{ with $service }} --service {{ . }}{{ end }}
{{- end -}}
{{- end -}}
