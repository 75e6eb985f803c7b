{{/* What the cluster at hand serves: before 1.24 it cannot probe over gRPC, and some kinds have older names. */}}
{{- define "baton.pdbVersion" -}}
{{- ternary "policy/v1" "policy/v1beta1" (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
{{- end -}}

{{- define "baton.hpaVersion" -}}
{{- ternary "autoscaling/v2" "autoscaling/v2beta2" (semverCompare ">=1.23-0" .Capabilities.KubeVersion.Version) -}}
{{- end -}}

{{/* Asks a process whether it answers, or whether it serves. Takes a list: root, port, service; an empty
service: whether it answers at all. A kubelet speaks no mutual TLS, and before 1.24 no gRPC. */}}
{{- define "baton.probe" -}}
{{- $root := index . 0 -}}
{{- $port := index . 1 -}}
{{- $service := index . 2 -}}
{{- $mutual := $root.Values.tls.workers.enabled -}}
{{- if and (not $mutual) (semverCompare ">=1.24-0" $root.Capabilities.KubeVersion.Version) -}}
grpc: {port: {{ $port }}{{ with $service }}, service: {{ . }}{{ end }}}
{{- else -}}
exec:
  command:
    - sh
    - -c
    - >-
      exec baton health --address "${BATON_HOST:-127.0.0.1}:{{ $port }}"{{ with $service }} --service {{ . }}{{ end }}
      {{- if $mutual }}
      --tls-cert /etc/baton-tls/tls.crt --tls-key /etc/baton-tls/tls.key --tls-ca /etc/baton-tls/ca.crt
      --tls-server-name {{ $root.Values.tls.workers.serverName }}
      {{- end }}
{{- end -}}
{{- end -}}

{{/* Seconds between two probes: one that is a process takes a second of CPU time. Takes a list: root, seconds. */}}
{{- define "baton.probePeriod" -}}
{{- if (index . 0).Values.tls.workers.enabled -}}{{ mul 3 (index . 1) }}{{- else -}}{{ index . 1 }}{{- end -}}
{{- end -}}
